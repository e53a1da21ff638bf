# SPDX-License-Identifier: Apache-2.0
"""Our metrics under the names of other servers, for dashboards and alerts that exist already.

Sources: vLLM's ``v1/metrics/loggers.py``; Triton's metrics document and the TensorRT-LLM backend's README. What we do not measure
has no line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import Metric
from prometheus_client.samples import Sample

__all__ = ["METRIC_NAMES", "mirrored"]

Families = Mapping[str, Metric]
Line = tuple[str, Mapping[str, str], float]
"""A sample: name, labels, value."""

_VLLM = MappingProxyType(
    {
        "requests_running": "num_requests_running",
        "requests_waiting": "num_requests_waiting",
        "kv_cache_usage_ratio": "kv_cache_usage_perc",
        "prefix_cache_query_tokens": "prefix_cache_queries",
        "prefix_cache_hit_tokens": "prefix_cache_hits",
        "preemptions": "num_preemptions",
        "prompt_tokens": "prompt_tokens",
        "generation_tokens": "generation_tokens",
        "requests_finished": "request_success",
        "time_to_first_token_seconds": "time_to_first_token_seconds",
        "inter_token_latency_seconds": "inter_token_latency_seconds",
        "request_duration_seconds": "e2e_request_latency_seconds",
        "request_decode_seconds": "request_decode_time_seconds",
        "request_prompt_tokens": "request_prompt_tokens",
        "request_generation_tokens": "request_generation_tokens",
    }
)
_VLLM_REASONS = MappingProxyType({"cancelled": "abort"})


def _vllm(families: Families, model: str) -> Iterator[tuple[str, str, list[Line]]]:
    for ours, theirs in _VLLM.items():
        family = families.get(f"phalanx_{ours}")
        if family is None:
            continue
        lines: list[Line] = []
        for sample in family.samples:
            labels = {"model_name": model, "engine": "0", **sample.labels}
            if reason := labels.pop("finish_reason", None):
                labels["finished_reason"] = _VLLM_REASONS.get(reason, reason)
            lines.append((sample.name.replace(family.name, f"vllm:{theirs}", 1), labels, sample.value))
        yield f"vllm:{theirs}" + ("_total" if family.type == "counter" else ""), family.type, lines


def _triton(families: Families, model: str) -> Iterator[tuple[str, str, list[Line]]]:
    model_labels = {"model": model, "version": "1"}

    def values(name: str, suffix: str = "") -> dict[str, float]:
        samples = _samples(families, f"phalanx_{name}", f"phalanx_{name}{suffix}")
        return {next(iter(sample.labels.values()), ""): sample.value for sample in samples}

    def total(name: str, suffix: str = "") -> float:
        return sum(values(name, suffix).values())

    finished, refused = values("requests_finished", "_total"), values("requests_refused", "_total")
    succeeded = finished.get("stop", 0) + finished.get("length", 0)
    failed = {
        "REJECTED": refused.get("429", 0) + refused.get("503", 0),
        "CANCELED": finished.get("cancelled", 0),
        "OTHER": finished.get("error", 0),
    }
    for name, kind, value in (
        ("nv_inference_request_success", "counter", succeeded),
        ("nv_inference_count", "counter", succeeded),
        ("nv_inference_exec_count", "counter", total("engine_steps", "_total")),
        ("nv_inference_pending_request_count", "gauge", total("requests_waiting")),
        ("nv_inference_request_duration_us", "counter", total("request_duration_seconds", "_sum") * 1e6),
    ):
        yield name, kind, [(name, model_labels, value)]
    name = "nv_inference_request_failure"
    yield name, "counter", [(name, {**model_labels, "reason": reason}, value) for reason, value in failed.items()]
    yield "nv_inference_first_response_histogram_ms", "histogram", list(_first_response(families, model_labels))
    name = "nv_trt_llm_request_metrics"
    active = {"waiting": total("requests_waiting"), "active": total("requests_running")}
    yield name, "gauge", [(name, {**model_labels, "request_type": kind}, value) for kind, value in active.items()]
    name = "nv_trt_llm_kv_cache_block_metrics"
    fraction = {**model_labels, "kv_cache_block_type": "fraction"}
    yield name, "gauge", [(name, fraction, total("kv_cache_usage_ratio"))]


def _first_response(families: Families, model_labels: Mapping[str, str]) -> Iterator[Line]:
    ours = "phalanx_time_to_first_token_seconds"
    for sample in _samples(families, ours, ""):
        name = sample.name.replace(ours, "nv_inference_first_response_histogram_ms", 1)
        labels, value = {**model_labels, **sample.labels}, sample.value
        if "le" in labels:
            labels["le"] = _number(float(labels["le"]) * 1000)
        yield name, labels, value * 1000 if name.endswith("_sum") else value


def _samples(families: Families, family: str, name: str) -> Sequence[Sample]:
    """The samples of a family, of one name if it is given."""
    found = families.get(family)
    return [sample for sample in found.samples if name in ("", sample.name)] if found is not None else ()


METRIC_NAMES: Mapping[str, Callable[[Families, str], Iterator[tuple[str, str, list[Line]]]]] = MappingProxyType(
    {"vllm": _vllm, "triton": _triton}
)


def mirrored(metrics: Iterable[Metric], servers: Sequence[str], model: str) -> bytes:
    """Return our ``metrics`` under the names that ``servers``, keys of `METRIC_NAMES`, have for them, in the text format 0.0.4."""
    families = {metric.name: metric for metric in metrics}
    lines: list[str] = []
    for server in servers:
        for name, kind, samples in METRIC_NAMES[server](families, model):
            lines.append(f"# TYPE {name} {kind}\n")
            lines += [f"{sample}{{{_labels(labels)}}} {_number(value)}\n" for sample, labels, value in samples]
    return "".join(lines).encode()


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(float(value))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
