# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one server, all named ``phalanx_...``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phalanx.runtime.server.link.messages import Stats

__all__ = ["Metrics"]

FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    """Gauges follow the engine's latest counts; counters and histograms are fed by the handlers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._last: Stats | None = None
        self._running = Gauge("phalanx_requests_running", "Sequences that run", registry=registry)
        self._waiting = Gauge("phalanx_requests_waiting", "Requests that wait for a slot", registry=registry)
        self._kv_usage = Gauge(
            "phalanx_kv_cache_usage_ratio", "Cache blocks held by sequences, 0 to 1", registry=registry
        )
        self._engine_counters = {
            name: Counter(f"phalanx_{metric}", text, registry=registry)
            for name, metric, text in (
                ("num_steps", "engine_steps", "Steps finished"),
                ("num_preemptions", "preemptions", "Times that a sequence lost its cache blocks"),
                ("prefix_query_tokens", "prefix_cache_query_tokens", "Tokens looked up in the prefix cache"),
                ("prefix_hit_tokens", "prefix_cache_hit_tokens", "Tokens found in the prefix cache"),
            )
        }
        self.prompt_tokens = Counter("phalanx_prompt_tokens", "Prompt tokens of all requests", registry=registry)
        self.generation_tokens = Counter("phalanx_generation_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "phalanx_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "phalanx_inter_token_latency_seconds",
            "Between two tokens of a request",
            buckets=INTER_TOKEN_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "phalanx_request_duration_seconds",
            "From the arrival of a request to the end of its answer",
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.finished = Counter(
            "phalanx_requests_finished", "Answers by how they ended", ["finish_reason"], registry=registry
        )
        self.refused = Counter(
            "phalanx_requests_refused", "HTTP requests answered with an error", ["status"], registry=registry
        )

    def take(self, stats: Stats) -> None:
        """The engine's latest counts."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_blocks_used / max(1, stats.kv_blocks_total))
        for name, counter in self._engine_counters.items():
            before = getattr(self._last, name) if self._last is not None else 0
            counter.inc(max(0, getattr(stats, name) - before))
        self._last = stats

    def render(self) -> bytes:
        """The text format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry)
