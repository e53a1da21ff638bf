"""Requests that do not run yet, in order of arrival, and the deadlines of all."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import takewhile

from phalanx.runtime.scheduler.sequences import Sequence

__all__ = ["Deadlines", "WaitingQueue"]

_MIN_PRUNE = 64


class WaitingQueue:
    """First come, first served; preempted sequences go back to their place, which is at or near the front.

    Nothing younger than a waiting sequence was admitted, except where it waited for another to compute its prompt, or for a mask.

    Attributes:
        masked: those with masks, by number.
    """

    def __init__(self) -> None:
        self._by_number: OrderedDict[int, Sequence] = OrderedDict()
        self.masked: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Sequence]:
        """The oldest first."""
        return iter(self._by_number.values())

    def append(self, sequence: Sequence) -> None:
        """Queue a new request."""
        self._add(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence again, before all that arrived after it."""
        older = list(takewhile(lambda number: number < sequence.number, self._by_number))
        self._add(sequence)
        for number in (sequence.number, *reversed(older)):
            self._by_number.move_to_end(number, last=False)

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence; no-op if it is not queued."""
        self._by_number.pop(sequence.number, None)
        self.masked.pop(sequence.number, None)

    def _add(self, sequence: Sequence) -> None:
        self._by_number[sequence.number] = sequence
        if sequence.mask is not None:
            self.masked[sequence.number] = sequence


class Deadlines:
    """A heap of deadlines. Entries of ended requests are dropped whenever the heap has doubled, so it stays small."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._prune_at = _MIN_PRUNE

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, sequence: Sequence) -> None:
        """Watch the deadline of a sequence, in monotonic seconds."""
        if len(self._heap) >= self._prune_at:
            self._heap = [entry for entry in self._heap if not entry[2].has_ended]
            heapq.heapify(self._heap)
            self._prune_at = 2 * len(self._heap) + _MIN_PRUNE
        heapq.heappush(self._heap, (deadline, sequence.number, sequence))

    def take_overdue(self, now: float) -> Iterator[Sequence]:
        """Live sequences whose deadline is at or before ``now``; those that end with an earlier one are left out."""
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if not sequence.has_ended:
                yield sequence
