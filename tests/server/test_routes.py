"""The routes that operators and tools use."""

from __future__ import annotations

import phalanx

from .servers import Server


def metrics(server: Server) -> dict[str, float]:
    lines = server.get("/metrics").body.decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_version(server: Server) -> None:
    assert server.get("/version").json == {"version": phalanx.__version__}


def test_models_are_listed_under_all_names(server: Server) -> None:
    listed = server.get("/v1/models").json
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["stub", "org/stub"]
    assert {card["max_model_len"] for card in listed["data"]} == {256}
    assert server.get("/v1/models/org/stub").json == listed["data"][1]


def test_answers_carry_the_first_name(server: Server) -> None:
    assert server.post("/v1/completions", {"prompt": "a", "model": "org/stub"}).json["model"] == "stub"


def test_health_and_ready(server: Server) -> None:
    for path in ("/health", "/ready", "/ping"):
        answer = server.get(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_tokenizer_info(server: Server, token_server: Server) -> None:
    assert server.get("/tokenizer_info").json == {"eos_token": "<|end|>"}
    assert token_server.get("/tokenizer_info").status == 400


def test_metrics_count_what_happens(server: Server) -> None:
    before = metrics(server)
    answer = server.post("/v1/completions", {"prompt": ["ab", "cde"], "max_tokens": 3, "stop": "de"})
    assert answer.status == 200
    server.post("/v1/completions", {"prompt": "a", "top_p": 3})
    after = metrics(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("phalanx_prompt_tokens_total") == 5
    assert grown("phalanx_generation_tokens_total") == 6
    assert grown('phalanx_requests_finished_total{finish_reason="length"}') == 1
    assert grown('phalanx_requests_finished_total{finish_reason="stop"}') == 1
    assert grown("phalanx_time_to_first_token_seconds_count") == 1
    assert grown("phalanx_request_duration_seconds_count") == 1
    assert grown('phalanx_requests_refused_total{status="400"}') == 1


def test_metrics_show_the_engines_counts(server: Server) -> None:
    shown = metrics(server)
    assert shown["phalanx_preemptions_total"] == 3
    assert shown["phalanx_kv_saturated_total"] == 11
    assert shown["phalanx_prefix_cache_query_tokens_total"] == 20
    assert shown["phalanx_prefix_cache_hit_tokens_total"] == 5
    assert 0 <= shown["phalanx_kv_cache_usage_ratio"] <= 1
    assert {"phalanx_requests_running", "phalanx_requests_waiting", "phalanx_engine_steps_total"} <= set(shown)


def test_metrics_have_the_content_type_of_prometheus(server: Server) -> None:
    assert server.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
