# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one server, all named ``phalanx_...``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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


class TokenHistogram(Collector):
    """A histogram that is fed with every token: a tenth of the cost of the library's own, whose counters take a lock each."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text, self._bounds = name, text, list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        yield HistogramMetricFamily(
            self._name,
            self._text,
            buckets=list(zip(bounds, accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


class Metrics:
    """Gauges follow the engine's latest counts; counters and histograms are fed by the handlers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._last: dict[str, int] = {}
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
        self.num_generated_tokens = 0
        self._generation_tokens = Counter("phalanx_generation_tokens", "Tokens generated", registry=registry)
        self.first_token = TokenHistogram(
            "phalanx_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            FIRST_TOKEN_SECONDS,
            registry,
        )
        self.inter_token = TokenHistogram(
            "phalanx_inter_token_latency_seconds",
            "Between two tokens of a request",
            INTER_TOKEN_SECONDS,
            registry,
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
        scheduler = stats.scheduler
        self._running.set(scheduler.num_running)
        self._waiting.set(scheduler.num_waiting)
        self._kv_usage.set(scheduler.kv_blocks_used / max(1, scheduler.kv_blocks_total))
        counts = {
            "num_steps": stats.num_steps,
            "num_preemptions": scheduler.num_preemptions,
            "prefix_query_tokens": scheduler.prefix_query_tokens,
            "prefix_hit_tokens": scheduler.prefix_hit_tokens,
        }
        for name, counter in self._engine_counters.items():
            counter.inc(max(0, counts[name] - self._last.get(name, 0)))
        self._last = counts

    def render(self) -> bytes:
        """The text format of Prometheus, version 0.0.4."""
        self._generation_tokens.inc(self.num_generated_tokens)
        self.num_generated_tokens = 0
        return generate_latest(self._registry)
