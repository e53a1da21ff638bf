"""Requests that have no slot, in order of arrival, and the deadlines of all."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from phalanx.runtime.scheduler.sequences import Sequence

__all__ = ["Deadlines", "WaitingQueue"]


class WaitingQueue:
    """First come, first served; preempted sequences arrived before all others, so they go back to the front.

    That keeps the queue sorted: a preempted sequence is the youngest that ran, and nothing younger was ever
        admitted.
    """

    def __init__(self) -> None:
        self._by_number: OrderedDict[int, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def first(self) -> Sequence:
        """The oldest."""
        return next(iter(self._by_number.values()))

    def append(self, sequence: Sequence) -> None:
        """A new request."""
        self._by_number[sequence.number] = sequence

    def put_back(self, sequence: Sequence) -> None:
        """A preempted one."""
        self._by_number[sequence.number] = sequence
        self._by_number.move_to_end(sequence.number, last=False)

    def discard(self, sequence: Sequence) -> None:
        """One that started, or ended while it waited; others pass."""
        self._by_number.pop(sequence.number, None)


class Deadlines:
    """A heap of deadlines; entries of sequences that ended earlier leave it when their time comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def add(self, deadline: float, sequence: Sequence) -> None:
        """Watch a sequence."""
        heapq.heappush(self._heap, (deadline, sequence.number, sequence))

    def take_overdue(self, now: float) -> list[Sequence]:
        """Sequences whose deadline is at or before ``now``, ended ones among them."""
        overdue = []
        while self._heap and self._heap[0][0] <= now:
            overdue.append(heapq.heappop(self._heap)[2])
        return overdue
