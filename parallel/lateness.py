# SPDX-License-Identifier: Apache-2.0
"""Noticing in a loop that this process was suspended, as Slurm does with all processes of a job."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Lateness"]

SUSPENDED_SECONDS = 2.0
"""A round that begins later than that comes after a suspension, or this process was starved: waits must not count the time."""


class Lateness:
    """How late the rounds of a loop begin; the first is due at once.

    Args:
        period: seconds from the begin of one round to that of the next.

    Attributes:
        due: when the next round begins, by ``clock``.
    """

    def __init__(self, period: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._period, self._clock = period, clock
        self.due = clock()

    def begin_round(self) -> float:
        """Return the seconds for which this process was suspended before this round; 0 = it was not."""
        now = self._clock()
        late, self.due = now - self.due, now + self._period
        return late if late > SUSPENDED_SECONDS else 0.0
