# SPDX-License-Identifier: Apache-2.0
"""Which step runs as which captured CUDA graph.

A graph is fixed in its number of rows, so steps are rounded up to buckets; everything else that varies (lengths, sequences,
block tables, sampling parameters) is read on the device. Which bucket a step falls into follows from the plan alone,
and all ranks see the same plans, so ranks agree on when to capture and what to replay: a graph with NCCL in it is a
collective.

A step that decodes has one row that samples for each of its rows; in one with prompts the two numbers vary apart. Their buckets are
coarser, so that traffic meets few pairs: a pair's first two steps run without a graph, launch by launch, in three times the time of
a step or more, and every stream waits for them.

Rows with top-k, top-p or min-p need whole rows of logits where the others need eight bytes of each slice, which costs every row of a
step, and over ranks an all-gather of the vocabulary: so filters are part of the key, instead of every graph running them with neutral values. Most
requests have them all the same (``generation_config.json`` sets them), so a start captures decoding steps both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from phalanx.kernels.graph_capture import capture

__all__ = ["DECODE_ROWS", "MOST_GRAPHS", "PREFILL_LOGIT_ROWS", "PREFILL_ROWS", "Buckets", "GraphCache", "StepKey"]

Outputs = TypeVar("Outputs")

MOST_GRAPHS = 512
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


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sizes to which counts are rounded up: powers of two, then multiples of a step that grows with them.

    Attributes:
        smallest: size; a power of two.
        step: smallest difference between sizes above it; a power of two, at least ``smallest``.
        per_octave: how many sizes there are between a large power of two and the next.
    """

    smallest: int
    step: int
    per_octave: int

    def size(self, count: int, limit: int) -> int:
        """``count`` rounded up, to ``limit`` at most."""
        above = 1 << max(count - 1, 0).bit_length()
        if count <= self.step:
            return min(max(above, self.smallest), limit)
        step = max(self.step, above // (2 * self.per_octave))
        return min(-(-count // step) * step, limit)

    def sizes(self, limit: int) -> list[int]:
        """All sizes up to ``limit``, ascending."""
        sizes = [self.size(1, limit)]
        while sizes[-1] < limit:
            sizes.append(self.size(sizes[-1] + 1, limit))
        return sizes


DECODE_ROWS = Buckets(smallest=1, step=8, per_octave=16)
"""Rows of a step that decodes only, each of which samples a token."""
PREFILL_ROWS = Buckets(smallest=64, step=64, per_octave=16)
"""Rows of a step with prompts."""
PREFILL_LOGIT_ROWS = Buckets(smallest=32, step=32, per_octave=2)
"""Those of them that sample a token; a padding row costs a product with the LM head only."""


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

    def run(self, key: StepKey, program: Callable[[StepKey], Outputs], *, at_once: bool = False) -> Outputs:
        """Enqueue the step. Enqueues on the stream; does not wait. *Collective, like the program.*

        ``at_once``: capture it after its first run. Without, a key that comes once costs no capture.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry()
            if not at_once:
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
        if not self._enabled or self.num_captured >= MOST_GRAPHS:
            return
        entry.graph, entry.outputs = capture(self._stream, partial(program, key))
