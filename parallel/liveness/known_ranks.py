# SPDX-License-Identifier: Apache-2.0
"""What a rank knows of itself and of the ranks that it is connected to."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from phalanx.parallel.liveness.judge import RankState
from phalanx.parallel.liveness.messages import Message
from phalanx.parallel.liveness.progress import RankProgress, Stamp

__all__ = ["KnownRanks"]


class KnownRanks:
    """Rank 0 knows all, another rank itself and rank 0.

    Args:
        rank: this one.
        names: host and process id of each rank that is known.
    """

    def __init__(self, rank: int, names: Mapping[int, str], progress: RankProgress) -> None:
        self._rank, self._progress = rank, progress
        self._states = {known: RankState(known, name) for known, name in names.items()}
        self._heard_at = dict.fromkeys((known for known in names if known != rank), time.monotonic())
        self._left_at: dict[int, float] = {}
        self._num_saturated: dict[int, int] = {}
        self._retired: set[int] = set()

    def __getitem__(self, rank: int) -> RankState:
        return self._states[rank]

    def __contains__(self, rank: int) -> bool:
        return rank in self._states

    @property
    def own(self) -> RankState:
        """Of this rank."""
        return self._states[self._rank]

    @property
    def num_saturated(self) -> int:
        """Keys and values that the caches could not hold, as the last stamps say; those of retired ranks count."""
        return self._progress.num_saturated + sum(self._num_saturated.values())

    def hear(self, rank: int, message: Message) -> None:
        """Something has come from another rank, now."""
        self._heard_at[rank] = time.monotonic()
        if isinstance(message, Stamp):
            self._states[rank].stamp = message
            self._num_saturated[rank] = message.num_saturated

    def leave(self, rank: int) -> None:
        """Another rank says, now, that its work is done."""
        self._left_at[rank] = time.monotonic()

    def has_left(self, rank: int) -> bool:
        """Whether it has said so."""
        return rank in self._left_at

    def retire(self, group: Collection[int]) -> None:
        """The job goes on without these."""
        self._retired.update(group)
        for rank in group:
            self._states.pop(rank, None)
            self._heard_at.pop(rank, None)
            self._left_at.pop(rank, None)

    def has_retired(self, rank: int) -> bool:
        """Whether the job goes on without it."""
        return rank in self._retired

    def forgive(self, seconds: float) -> None:
        """Silence of so long does not count, because this rank did not listen; what it has heard since counts."""
        now = time.monotonic()
        self._heard_at = {rank: min(heard_at + seconds, now) for rank, heard_at in self._heard_at.items()}

    def states(self) -> list[RankState]:
        """Of all that take part, now."""
        now = time.monotonic()
        self.own.stamp = self._progress.stamp()
        for rank, heard_at in self._heard_at.items():
            self._states[rank].silent = now - heard_at
        for rank, left_at in self._left_at.items():
            self._states[rank].left = now - left_at
        return sorted(self._states.values(), key=lambda state: state.rank)

    def silent(self, seconds: float) -> Iterator[RankState]:
        """Ranks that have not been heard for longer than that."""
        return (state for state in self.states() if state.silent > seconds)
