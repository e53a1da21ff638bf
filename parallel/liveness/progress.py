# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing: written by the thread that does it, read by the one that watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

__all__ = ["STAMP_SECONDS", "Activity", "RankProgress", "Stamp"]

STAMP_SECONDS = 0.5
"""How often a rank sends one."""

Activity = Literal["starting", "waiting", "stepping"]
"""``starting`` and ``stepping`` must end within their limits; ``waiting`` may last."""


OnPhase = Callable[[str, int, int | None], None]


class Stamp(msgspec.Struct, frozen=True, tag=True):
    """One moment of a rank.

    Attributes:
        phase: what it is doing, in words.
        step: the last step that it began; -1 = none yet.
        collective: the collective that it is in; empty = none.
        num_collectives: collectives begun since the start.
        seconds: since this activity began or its last step ended.
        num_saturated: keys and values that its cache could not hold, since the start.
    """

    activity: Activity = "starting"
    phase: str = "starting"
    step: int = -1
    collective: str = ""
    num_collectives: int = 0
    seconds: float = 0.0
    num_saturated: int = 0

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step >= 0 else ""
        where = f", in {self.collective} (collective {self.num_collectives})" if self.collective else ""
        return f"{self.phase}{step}{where}, for {self.seconds:.1f} s"


class RankProgress:
    """The state behind a rank's stamps. Writers pay for a few attribute stores."""

    __slots__ = (
        "_clock",
        "_on_phase",
        "_since",
        "activity",
        "collective",
        "current_phase",
        "num_collectives",
        "num_saturated",
        "step",
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._on_phase: OnPhase | None = None
        self._since = clock()
        self.activity: Activity = "starting"
        self.current_phase = "starting"
        self.step = -1
        self.collective = ""
        self.num_collectives = self.num_saturated = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what this rank is doing, in stamps and in the notes of an error."""
        outer, self.current_phase = self.current_phase, name
        self._since = self._clock()
        self._tell(0, None)
        try:
            yield
        except Exception as error:
            error.add_note(f"while {name}")
            raise
        self.current_phase = outer

    @contextmanager
    def reporting(self, on_phase: OnPhase | None) -> Iterator[None]:
        """Meanwhile tell ``on_phase`` what this rank does, and how much of it is done: ``(phase, done, total)``.

        A phase begins with 0 of None.
        """
        self._on_phase = on_phase
        try:
            yield
        finally:
            self._on_phase = None

    def advance(self, done: int, total: int) -> None:
        """``done`` of the ``total`` pieces of this phase are done."""
        self._tell(done, total)

    def begin_step(self, step: int) -> None:
        """A step starts; with others in flight, the limit still counts from the last one that ended."""
        self.step = step
        if self.activity != "stepping":
            self.activity, self._since = "stepping", self._clock()

    def end_step(self, num_in_flight: int, num_saturated: int = 0) -> None:
        """A step has ended; without another in flight this rank waits for work.

        ``num_saturated``: keys and values that this rank's cache could not hold, since the start.
        """
        self.num_saturated = num_saturated
        self.activity = "stepping" if num_in_flight else "waiting"
        self._since = self._clock()

    def wait(self) -> None:
        """This rank is ready and has nothing to do."""
        self.end_step(0, self.num_saturated)

    def forgive(self, seconds: float) -> None:
        """Have this time not count towards a limit, as the whole job was suspended; called by the thread that watches."""
        self._since = min(self._since + seconds, self._clock())

    def _tell(self, done: int, total: int | None) -> None:
        if self._on_phase is not None:
            self._on_phase(self.current_phase, done, total)

    def stamp(self) -> Stamp:
        """This moment; called by the thread that watches."""
        seconds = self._clock() - self._since
        return Stamp(
            self.activity, self.current_phase, self.step, self.collective, self.num_collectives, seconds, self.num_saturated
        )  # fmt: skip
