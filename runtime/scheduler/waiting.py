# SPDX-License-Identifier: Apache-2.0
"""Requests that do not run yet, in the order in which they will, and the deadlines of all."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, takewhile

from phalanx.runtime.scheduler.sequences import Sequence

__all__ = ["Deadlines", "WaitingQueue"]

_MIN_PRUNE = 64


class WaitingQueue:
    """Lower priorities first; within one, first come, first served. Preempted sequences go back to their place.

    While a sequence waits nothing after it in order is admitted, except where it waits for another to compute its prompt, or for a mask.

    Attributes:
        masked: those with masks, by number.
    """

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[int, Sequence]] = {}
        self._priorities: list[int] = []
        self._length = 0
        self.masked: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """The first in order first."""
        return chain.from_iterable(self._by_priority[priority].values() for priority in self._priorities)

    def append(self, sequence: Sequence) -> None:
        """Queue a new request."""
        self._add(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence again, before all of its priority that arrived after it."""
        by_number = self._add(sequence)
        older = list(takewhile(lambda number: number < sequence.number, by_number))
        for number in (sequence.number, *reversed(older)):
            by_number.move_to_end(number, last=False)

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence; no-op if it is not queued."""
        priority = sequence.request.priority
        by_number = self._by_priority.get(priority)
        if by_number is None or by_number.pop(sequence.number, None) is None:
            return
        self._length -= 1
        self.masked.pop(sequence.number, None)
        if not by_number:
            del self._by_priority[priority]
            self._priorities.remove(priority)

    def _add(self, sequence: Sequence) -> OrderedDict[int, Sequence]:
        """Put a sequence last among those of its priority, which are returned, by number."""
        priority = sequence.request.priority
        if priority not in self._by_priority:
            self._by_priority[priority] = OrderedDict()
            insort(self._priorities, priority)
        by_number = self._by_priority[priority]
        by_number[sequence.number] = sequence
        self._length += 1
        if sequence.mask is not None:
            self.masked[sequence.number] = sequence
        return by_number


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
