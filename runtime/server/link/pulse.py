# SPDX-License-Identifier: Apache-2.0
"""Ends an engine whose process runs no more, where no other rank does: there is none, or all are stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from phalanx.parallel.lateness import Lateness
from phalanx.runtime.server.link.engine_client import EngineClient, ServerState

__all__ = ["PulseCheck"]

CHECK_SECONDS = 1.0
RANKS_FIRST_SECONDS = 3.0
"""How much later than other ranks this process gives rank 0 up: they say more."""


class PulseCheck:
    """Looks every second when rank 0 was last heard.

    Args:
        silence_seconds: how long other ranks wait for a sign of life of one that serves.
        starting_seconds: the same while ranks load, when a library may keep Python from running.
    """

    def __init__(
        self,
        client: EngineClient,
        silence_seconds: float,
        starting_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._clock = client, clock
        self._silence, self._starting = silence_seconds, starting_seconds
        self._lateness = Lateness(CHECK_SECONDS, clock)

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.check()

    def check(self) -> None:
        """Look once."""
        client, now, suspended = self._client, self._clock(), self._lateness.begin_round()
        if client.pulse_at is None:
            return
        if suspended:
            client.pulse_at = min(client.pulse_at + suspended, now)  # a pulse that waited here is of this moment
            return
        limit = self._starting if client.state is ServerState.STARTING else self._silence
        if (silent := now - client.pulse_at) > limit + RANKS_FIRST_SECONDS:
            client.end_silent_engine(silent)
