"""Which step runs as which captured CUDA graph.

A graph is fixed in its number of rows, so steps are rounded up to buckets; everything else that varies (lengths, sequences,
block tables, sampling parameters) is read on the device. Which bucket a step falls into follows from the plan alone,
and all ranks see the same plans, so ranks agree on when to capture and what to replay: a graph with NCCL in it is a
collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["GraphCache", "StepKey", "bucket_size", "bucket_sizes"]

Outputs = TypeVar("Outputs")

_MOST_GRAPHS = 512
"""A graph of a 32-layer model takes about a megabyte of device memory."""


@dataclass(frozen=True, slots=True)
class StepKey:
    """What a captured step is fixed in.

    Attributes:
        num_rows: tokens, rounded up; at least 1.
        num_logit_rows: rows that sample a token, rounded up; 0 = the step ends without logits.
        has_prefill: some sequence computes several tokens.
        filters: some row samples with top-k, top-p or min-p.
        adjusts: some row that samples has token biases, penalties or a mask.
        num_top: alternatives whose log-probabilities are wanted; -1 = no log-probabilities.
    """

    num_rows: int
    num_logit_rows: int
    has_prefill: bool
    filters: bool = False
    adjusts: bool = False
    num_top: int = -1


def bucket_size(count: int, limit: int) -> int:
    """``count`` rounded up to a bucket of at most ``limit``: powers of two to 8, then steps of 8 or 1/16."""
    if count <= 8:
        size = 1 << max(count - 1, 0).bit_length()
    else:
        step = max(8, (1 << (count - 1).bit_length()) // 32)
        size = -(-count // step) * step
    return min(size, limit)


def bucket_sizes(limit: int) -> list[int]:
    """All buckets up to ``limit``, ascending."""
    sizes = [bucket_size(1, limit)]
    while sizes[-1] < limit:
        sizes.append(bucket_size(sizes[-1] + 1, limit))
    return sizes


@dataclass(slots=True)
class _Entry:
    """A step shape that ran before: first without a graph, which compiles, loads and tunes what it needs."""

    graph: Any = None
    outputs: Any = None


class GraphCache(Generic[Outputs]):
    """Runs a program of a step eagerly the first two times that its key appears, captures it after the second, then replays it.

    Captured right after it ran, a program finds everything as the run left it: a TensorRT engine changes shapes in the run, not in
    the capture.

    Args:
        stream: where everything runs; not the default stream, which cannot be captured.
        enabled: False = always eager.
    """

    def __init__(self, stream: Any, enabled: bool = True) -> None:
        self._stream = stream
        self._enabled = enabled
        self._entries: dict[StepKey, _Entry] = {}

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return sum(entry.graph is not None for entry in self._entries.values())

    def run(self, key: StepKey, program: Callable[[StepKey], Outputs]) -> Outputs:
        """Enqueue the step. Enqueues on the stream; does not wait. *Collective, like the program.*"""
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry()
            return program(key)
        if entry.graph is None:
            returned = program(key)
            self._capture(key, entry, program)
            return returned
        entry.graph.launch(self._stream)
        outputs: Outputs = entry.outputs
        return outputs

    def clear(self) -> None:
        """Forget all graphs, for example because what they refer to has moved."""
        for entry in self._entries.values():
            entry.graph = entry.outputs = None

    def _capture(self, key: StepKey, entry: _Entry, program: Callable[[StepKey], Outputs]) -> None:
        if not self._enabled or self.num_captured >= _MOST_GRAPHS:
            return
        from cupy.cuda import runtime

        self._stream.begin_capture(runtime.streamCaptureModeThreadLocal)
        try:
            entry.outputs = program(key)
        finally:
            graph = self._stream.end_capture()
        entry.graph = graph
