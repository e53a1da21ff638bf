# SPDX-License-Identifier: Apache-2.0
"""A timeline of the last steps of every rank, as a Chrome trace that Perfetto opens.

While it records, steps run eagerly with a pair of events around every operation: a captured graph would show as one
piece. The host's spans are there too, so a gap on the device shows what the host did meanwhile.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.hosts import host_ids
from phalanx.runtime.config import Activation
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.cuda.ops import CudaOps
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec

__all__ = ["Category", "Timeline", "TracedOps", "write_chrome_trace"]

Category = Literal["GEMM", "attention", "communication", "bubble", "other", "host"]

_LANES = ("host", "device")
_KEPT_STEPS = 64
_CLOCK_ROUNDS = 5


@dataclass(slots=True)
class _Step:
    """Spans of one step: on the host in seconds of the monotonic clock, on the device as pairs of events."""

    host: list[tuple[str, float, float]] = field(default_factory=list)
    device: list[tuple[str, Category, Any, Any]] = field(default_factory=list)


class Timeline:
    """Spans of the last steps of one rank. Args: the stream that is timed, and a monotonic clock in seconds."""

    def __init__(self, stream: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._steps: deque[_Step] = deque([_Step()], maxlen=_KEPT_STEPS)

    def next_step(self) -> None:
        """Spans from here on belong to a new step; the oldest is forgotten."""
        self._steps.append(_Step())

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """A span of the host's time."""
        start = self._clock()
        try:
            yield
        finally:
            self._steps[-1].host.append((name, start, self._clock()))

    @contextmanager
    def device(self, name: str, category: Category) -> Iterator[None]:
        """A span of what is enqueued meanwhile."""
        import cupy

        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(self._stream)
        yield
        end.record(self._stream)
        self._steps[-1].device.append((name, category, start, end))

    def forget_last(self) -> None:
        """Drop the device's span that ended last, in which nothing was enqueued."""
        self._steps[-1].device.pop()

    def events(self, rank: int, clock_offset: float) -> list[dict[str, Any]]:
        """Chrome trace events, times in microseconds of the first rank's clock. Waits for the device."""
        import cupy

        anchor = cupy.cuda.Event()
        anchor.record(self._stream)
        anchor.synchronize()
        now = self._clock()
        elapsed = cupy.cuda.get_elapsed_time

        def span(name: str, category: str, lane: str, start: float, seconds: float) -> dict[str, Any]:
            return {
                "ph": "X", "name": name, "cat": category, "pid": rank, "tid": _LANES.index(lane),
                "ts": 1e6 * (start + clock_offset), "dur": 1e6 * seconds,
            }  # fmt: skip

        spans: list[dict[str, Any]] = [_name("process_name", rank, 0, f"rank {rank}")]
        spans += [_name("thread_name", rank, number, lane) for number, lane in enumerate(_LANES)]
        for step in self._steps:
            spans += [span(name, "host", "host", start, end - start) for name, start, end in step.host]
            for name, category, start, end in step.device:
                begun = now - elapsed(start, anchor) / 1e3
                spans.append(span(name, category, "device", begun, elapsed(start, end) / 1e3))
        return spans


def _name(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}}


class TracedOps(CudaOps):
    """The same operations with a span around each that takes device time worth seeing."""

    def __init__(self, timeline: Timeline, *parts: Any) -> None:
        """``parts``: the arguments of `CudaOps`."""
        super().__init__(*parts)
        self._timeline = timeline

    def _multiply(self, rows: Any, name: str, out: DeviceArray, bias: DeviceArray | None) -> None:
        with self._timeline.device(name, "GEMM"):
            super()._multiply(rows, name, out, bias)

    def _multiply_gated(self, rows: Any, name: str, out: DeviceArray, kind: ActivationName) -> bool:
        with self._timeline.device(name, "GEMM"):
            is_made = super()._multiply_gated(rows, name, out, kind)
        if not is_made:
            self._timeline.forget_last()
        return is_made

    def attention(self, qkv: DeviceArray, name: str, layer: int, spec: AttentionSpec) -> DeviceArray:
        qkv = self.values(qkv)  # a product that waited has a span of its own
        with self._timeline.device(name, "attention"):
            return super().attention(qkv, name, layer, spec)

    def experts(self, x: DeviceArray, name: str, spec: ExpertsSpec) -> DeviceArray:
        with self._timeline.device(name, "GEMM"):
            return super().experts(x, name, spec)

    def all_reduce(self, x: DeviceArray) -> DeviceArray:
        with self._timeline.device("all_reduce", "communication"):
            return super().all_reduce(x)

    def _gated(self, x: DeviceArray, kind: Activation) -> DeviceArray:
        with self._timeline.device(kind, "other"):
            return super()._gated(x, kind)

    def activation(self, x: DeviceArray, kind: Activation) -> DeviceArray:
        x = self.values(x)
        with self._timeline.device(kind, "other"):
            return super().activation(x, kind)

    def add_rms_norm(
        self, x: DeviceArray, residual: DeviceArray | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[DeviceArray, DeviceArray]:
        with self._timeline.device(name, "other"):
            return super().add_rms_norm(x, residual, name, eps, weight_offset)

    def add_layer_norm(
        self, x: DeviceArray, residual: DeviceArray | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[DeviceArray, DeviceArray]:
        with self._timeline.device(name, "other"):
            return super().add_layer_norm(x, residual, name, eps, weight_offset)


def write_chrome_trace(path: Path, timeline: Timeline, comm: Communicator) -> None:
    """Gather every rank's spans on rank 0 and write them there. *Collective over ``comm``.*"""
    events = timeline.events(comm.rank, _clock_offset(comm))
    parts = gather_bytes(comm, json.dumps(events).encode())
    if comm.rank == 0:
        merged = [event for part in parts for event in json.loads(part)]
        path.write_text(json.dumps({"traceEvents": merged, "displayTimeUnit": "ms"}))


def _clock_offset(comm: Communicator) -> float:
    """What to add to this rank's clock to get rank 0's: 0 on one host, else the median over a few barriers."""
    if len(set(host_ids(comm))) == 1:
        return 0.0
    offsets = []
    for _ in range(_CLOCK_ROUNDS):
        comm.barrier()
        clocks = comm.all_gather(np.array([time.monotonic()]))[:, 0]
        offsets.append(clocks[0] - clocks[comm.rank])
    return float(np.median(offsets))
