# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one server, all named ``phalanx_...``, summed over its HTTP processes."""

from __future__ import annotations

import asyncio
import collections
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from phalanx.runtime.scheduler import SchedulerStats
from phalanx.runtime.server.board import Board, Cells, Room
from phalanx.runtime.server.link.messages import Stats
from phalanx.runtime.server.metric_names import mirrored

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
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
FINISH_REASONS = ("stop", "length", "cancelled", "error")
STATUSES = ("400", "401", "404", "405", "408", "413", "415", "422", "429", "500", "501", "503", "other")
"""A process may not add columns to the board later, so labels have known values; the last one takes all others."""


class Count:
    """One number that only grows."""

    __slots__ = ("_column", "_own")

    def __init__(self, cells: Cells, column: int) -> None:
        self._own, self._column = cells.own, column

    def inc(self, amount: float = 1) -> None:
        """Count ``amount`` more."""
        self._own[self._column] += amount


class Counter(Collector):
    """A counter, one number for each value of its label."""

    def __init__(
        self,
        board: Board,
        registry: CollectorRegistry,
        name: str,
        text: str,
        label: str = "",
        values: Sequence[str] = ("",),
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._cells = board.take(len(values))
        self._counts = {value: Count(self._cells, column) for column, value in enumerate(values)}
        self._other = self._counts[values[-1]]
        self.inc = self._other.inc
        registry.register(self)

    def labels(self, value: str) -> Count:
        """The count of one value; the last one's if it is not known."""
        return self._counts.get(value, self._other)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, total in zip(self._counts, self._cells.sums(), strict=True):
            family.add_metric([value] if self._label else [], total)
        yield family


class Histogram(Collector):
    """A histogram, at a tenth of the cost of the library's own, whose counters take a lock each."""

    def __init__(
        self, board: Board, registry: CollectorRegistry, name: str, text: str, bounds: Sequence[float]
    ) -> None:
        self._name, self._text, self._bounds = name, text, list(bounds)
        self._cells = board.take(len(bounds) + 2)
        self._own = self._cells.own
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound is not below it."""
        self._own[bisect_left(self._bounds, value)] += 1
        self._own[-1] += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Count many values, at a third of the cost of one `observe` for each."""
        for bucket, count in collections.Counter(map(partial(bisect_left, self._bounds), values)).items():
            self._own[bucket] += count
        self._own[-1] += sum(values)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        *counts, total = self._cells.sums()
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        yield HistogramMetricFamily(
            self._name,
            self._text,
            buckets=list(zip(bounds, accumulate(counts), strict=True)),
            sum_value=total,
        )


class TokenCounts:
    """Tokens generated and the times between them, which are added to the metrics once in a turn of the event loop."""

    def __init__(self, tokens: Counter, gaps: Histogram) -> None:
        self._tokens, self._gaps = tokens, gaps
        self._num_tokens = 0
        self._seconds: list[float] = []

    def add(self, num_tokens: int, seconds: float) -> None:
        """Count tokens that came together, so many seconds after those before them."""
        if not self._seconds:
            asyncio.get_running_loop().call_soon(self.publish)
        self._num_tokens += num_tokens
        self._seconds.append(seconds)

    def publish(self) -> None:
        """Add all that was counted to the metrics now."""
        self._tokens.inc(self._num_tokens)
        self._gaps.observe_all(self._seconds)
        self._num_tokens, self._seconds = 0, []


def _kv_usage(schedulers: Sequence[SchedulerStats]) -> float:
    used = sum(scheduler.kv_blocks_used for scheduler in schedulers)
    return used / max(1, sum(scheduler.kv_blocks_total for scheduler in schedulers))


_GAUGES: tuple[tuple[str, str, Callable[[Sequence[SchedulerStats]], float]], ...] = (
    ("requests_running", "Sequences that run", lambda schedulers: sum(one.num_running for one in schedulers)),
    (
        "requests_waiting",
        "Requests that wait for a slot",
        lambda schedulers: sum(one.num_waiting for one in schedulers),
    ),
    ("kv_cache_usage_ratio", "Cache blocks held by sequences, 0 to 1", _kv_usage),
)


class EngineMetrics(Collector):
    """What the engine counts itself: of all replicas together, and of each. Every HTTP process is told the same, so nothing is summed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stats: Stats | None = None
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        if self.stats is None:
            return
        replicas = self.stats.replicas
        serving = [replica.scheduler for replica in replicas if not replica.is_lost]
        everyone = [replica.scheduler for replica in replicas]
        yield GaugeMetricFamily("phalanx_replicas_serving", "Replicas that take requests", len(serving))
        occupancy = "Steps in flight, of the most that pipeline stages and lookahead allow, 0 to 1"
        filled = sum(replica.pipeline_occupancy for replica in replicas) / max(1, len(serving))
        yield GaugeMetricFamily("phalanx_pipeline_occupancy_ratio", occupancy, filled)
        family = GaugeMetricFamily(
            "phalanx_replica_pipeline_occupancy_ratio", f"{occupancy}; of one replica", labels=["replica"]
        )
        for index, replica in enumerate(replicas):
            family.add_metric([str(index)], replica.pipeline_occupancy)
        yield family
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(f"phalanx_{name}", text, value(serving))
            family = GaugeMetricFamily(f"phalanx_replica_{name}", f"{text}, of one replica", labels=["replica"])
            for index, replica in enumerate(replicas):
                family.add_metric([str(index)], 0 if replica.is_lost else value([replica.scheduler]))
            yield family
        steps = CounterMetricFamily("phalanx_replica_steps", "Steps finished, of one replica", labels=["replica"])
        for index, replica in enumerate(replicas):
            steps.add_metric([str(index)], replica.num_steps)
        yield steps
        for name, text, count in (
            ("engine_steps", "Steps finished", sum(replica.num_steps for replica in replicas)),
            ("preemptions", "Times that a sequence lost its cache blocks", sum(s.num_preemptions for s in everyone)),
            (
                "prefix_cache_query_tokens",
                "Tokens looked up in the prefix cache",
                sum(s.prefix_query_tokens for s in everyone),
            ),
            ("prefix_cache_hit_tokens", "Tokens found in the prefix cache", sum(s.prefix_hit_tokens for s in everyone)),
            ("kv_saturated", "Keys and values that an fp8 cache could not hold", self.stats.num_saturated),
        ):
            yield CounterMetricFamily(f"phalanx_{name}", text, count)


class OpenRequests(Collector):
    """How requests are spread over the HTTP processes."""

    def __init__(self, registry: CollectorRegistry, room: Room) -> None:
        self._room = room
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = GaugeMetricFamily("phalanx_http_requests_open", "Requests open in an HTTP process", labels=["process"])
        for process, count in enumerate(self._room.num_open()):
            family.add_metric([str(process)], count)
        yield family


class Metrics:
    """Gauges follow the engine's latest counts; counters and histograms are fed by the handlers of all processes.

    Args:
        board: where the processes count.
        room: which requests are open.
        mirrors: servers under whose names the same metrics are shown, too; see `METRIC_NAMES`.
        model_name: what those call the model.
    """

    def __init__(self, board: Board, room: Room, mirrors: Sequence[str] = (), model_name: str = "") -> None:
        self._mirrors, self._model_name = tuple(mirrors), model_name
        self._registry = registry = CollectorRegistry()
        self._engine = EngineMetrics(registry)
        OpenRequests(registry, room)
        self.prompt_tokens = Counter(board, registry, "phalanx_prompt_tokens", "Prompt tokens of all requests")
        self.generation_tokens = Counter(board, registry, "phalanx_generation_tokens", "Tokens generated")
        self.first_token = Histogram(
            board,
            registry,
            "phalanx_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            FIRST_TOKEN_SECONDS,
        )
        self.inter_token = Histogram(
            board,
            registry,
            "phalanx_inter_token_latency_seconds",
            "Between two tokens of a request",
            INTER_TOKEN_SECONDS,
        )
        self.next_tokens = TokenCounts(self.generation_tokens, self.inter_token)
        self.duration = Histogram(
            board,
            registry,
            "phalanx_request_duration_seconds",
            "From the arrival of a request to the end of its answer",
            REQUEST_SECONDS,
        )
        self.decode = Histogram(
            board,
            registry,
            "phalanx_request_decode_seconds",
            "From the first token of a request to its last",
            REQUEST_SECONDS,
        )
        self.prompt_length = Histogram(
            board, registry, "phalanx_request_prompt_tokens", "Prompt tokens of an answer", TOKENS
        )
        self.generation_length = Histogram(
            board, registry, "phalanx_request_generation_tokens", "Tokens of an answer", TOKENS
        )
        self.finished = Counter(
            board, registry, "phalanx_requests_finished", "Answers by how they ended", "finish_reason", FINISH_REASONS
        )
        self.refused = Counter(
            board, registry, "phalanx_requests_refused", "HTTP requests answered with an error", "status", STATUSES
        )

    def take(self, stats: Stats) -> None:
        """The engine's latest counts."""
        self._engine.stats = stats

    def render(self) -> bytes:
        """The text format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry) + mirrored(self._registry.collect(), self._mirrors, self._model_name)
