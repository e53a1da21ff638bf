# SPDX-License-Identifier: Apache-2.0
"""How long one request may take, and what its client is told when it takes longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from phalanx.runtime.server.errors import ApiError

__all__ = ["TimeLimit"]


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """When a request must be over.

    Attributes:
        arrival: monotonic time at which it arrived.
        seconds: how long it may take from then on; None = any time.
    """

    arrival: float
    seconds: float | None = None

    @classmethod
    def shortest(cls, arrival: float, *limits: float | None) -> TimeLimit:
        """Return the strictest of several limits."""
        return cls(arrival, min((seconds for seconds in limits if seconds is not None), default=None))

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which the request must be over."""
        return None if self.seconds is None else self.arrival + self.seconds

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Cancel what is awaited inside when the time is over.

        Raises:
            ApiError: 408: it was.
        """
        deadline = self.deadline
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                yield
        except TimeoutError:
            raise self.exceeded() from None

    def exceeded(self) -> ApiError:
        """Return what the client is told after the deadline."""
        message = f"the request took longer than {self.seconds:g} s; ask for fewer tokens"
        return ApiError(408, message, code="request_timeout", headers={"x-should-retry": "false"})
