# SPDX-License-Identifier: Apache-2.0
"""Spreads a burst of new requests over turns of the event loop, so that running streams and ``/health`` get their share."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Turnstile"]

PER_TURN = 4
"""Requests that begin in one turn of the loop: about 2 ms of work, as much as streams get in a turn."""


class Turnstile:
    """Lets a few pass in each turn of the event loop, in order of arrival. Without it a burst would all begin in one turn."""

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._num_passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def enter(self) -> None:
        """Wait for a turn; no wait where fewer than the limit have begun in this one."""
        self._schedule()
        if self._num_passed < self._per_turn and not self._waiting:
            self._num_passed += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_scheduled = False
        self._num_passed = 0
        while self._waiting and self._num_passed < self._per_turn:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._num_passed += 1
        if self._waiting:
            self._schedule()
