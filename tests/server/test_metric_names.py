"""Metrics under the names of other servers have the values of ours; the dashboard asks for names that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.server.metric_names import METRIC_NAMES
from phalanx.runtime.server.settings import METRICS_OF, FrontendSettings

from .servers import ROOT, Server, stub_server

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def samples(model_directory: Path) -> Iterator[Samples]:
    """All samples of a server that has answered, refused and lost requests."""
    settings = {"model_names": ['a "b\\'], "metrics_compatibility": METRICS_OF}
    with stub_server(model_directory, settings, step_seconds=0.01) as server:
        assert server.post("/v1/completions", {"prompt": ["ab", "cde"], "max_tokens": 3, "stop": "de"}).status == 200
        assert server.post("/v1/completions", {"prompt": [14]}).status == 429
        assert server.post("/v1/completions", {"prompt": [12, 30]}).status == 500
        server.open_stream("/v1/completions", {"prompt": "ab", "max_tokens": 200}).close()
        server.wait_for("CANCELLED")
        yield read(server)


def read(server: Server) -> Samples:
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    return {
        (_sent_name(sample.name), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def _sent_name(name: str) -> str:
    """The parser adds the suffix that Triton's counters do not have."""
    return name.removesuffix("_total") if name.startswith("nv_") else name


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


VLLM = {
    "vllm:num_requests_running": "phalanx_requests_running",
    "vllm:num_requests_waiting": "phalanx_requests_waiting",
    "vllm:kv_cache_usage_perc": "phalanx_kv_cache_usage_ratio",
    "vllm:prefix_cache_queries_total": "phalanx_prefix_cache_query_tokens_total",
    "vllm:prefix_cache_hits_total": "phalanx_prefix_cache_hit_tokens_total",
    "vllm:num_preemptions_total": "phalanx_preemptions_total",
    "vllm:prompt_tokens_total": "phalanx_prompt_tokens_total",
    "vllm:generation_tokens_total": "phalanx_generation_tokens_total",
    "vllm:time_to_first_token_seconds_count": "phalanx_time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_sum": "phalanx_inter_token_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_sum": "phalanx_request_duration_seconds_sum",
    "vllm:request_decode_time_seconds_count": "phalanx_request_decode_seconds_count",
    "vllm:request_prompt_tokens_sum": "phalanx_request_prompt_tokens_sum",
    "vllm:request_generation_tokens_count": "phalanx_request_generation_tokens_count",
}
LABELS = {"model_name": 'a "b\\', "engine": "0"}
MODEL = {"model": 'a "b\\', "version": "1"}


@pytest.mark.parametrize(("theirs", "ours"), VLLM.items())
def test_vllms_names(samples: Samples, theirs: str, ours: str) -> None:
    assert value(samples, theirs, **LABELS) == value(samples, ours)


def test_vllms_finish_reasons(samples: Samples) -> None:
    counts = {
        reason: value(samples, "vllm:request_success_total", **LABELS, finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert counts == {"stop": 1, "length": 1, "abort": 1, "error": 1} | {"abort": counts["abort"]}
    assert counts["abort"] >= 1


def test_tritons_names(samples: Samples) -> None:
    assert value(samples, "nv_inference_request_success", **MODEL) == 2
    assert value(samples, "nv_inference_request_failure", **MODEL, reason="REJECTED") == 1
    assert value(samples, "nv_inference_request_failure", **MODEL, reason="OTHER") == 1
    assert value(samples, "nv_inference_request_failure", **MODEL, reason="CANCELED") >= 1
    seconds = value(samples, "phalanx_request_duration_seconds_sum")
    assert value(samples, "nv_inference_request_duration_us", **MODEL) == pytest.approx(seconds * 1e6)
    assert value(samples, "nv_inference_exec_count", **MODEL) == value(samples, "phalanx_engine_steps_total")
    first = {le: value(samples, "phalanx_time_to_first_token_seconds_bucket", le=le) for le in ("0.25", "+Inf")}
    name = "nv_inference_first_response_histogram_ms_bucket"
    assert value(samples, name, **MODEL, le="250.0") == first["0.25"]
    assert value(samples, name, **MODEL, le="+Inf") == first["+Inf"]
    running = value(samples, "phalanx_requests_running")
    assert value(samples, "nv_trt_llm_request_metrics", **MODEL, request_type="active") == running


def test_without_the_option_only_our_names_are_shown(server: Server) -> None:
    assert {name.partition("_")[0] for name, _ in read(server)} == {"phalanx"}


def test_the_operator_can_choose_every_server() -> None:
    assert set(METRICS_OF) == set(METRIC_NAMES)
    with pytest.raises(ConfigError, match="--metrics-compatibility=tgi is not known"):
        FrontendSettings(metrics_compatibility=("tgi",))


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported(samples: Samples) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana" / "phalanx.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 15
    exported = {name for name, _ in samples}
    asked = {name for query in queries for name in re.findall(r"\bphalanx_\w+", query)}
    assert asked <= exported
    assert all(re.search(r"\bphalanx_\w+", query) for query in queries)


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana" / "phalanx.json").read_text())
    assert [variable["type"] for variable in dashboard["templating"]["list"]] == ["datasource", "query"]
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for box in boxes
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
