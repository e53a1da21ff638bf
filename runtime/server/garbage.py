# SPDX-License-Identifier: Apache-2.0
"""Keeps Python's collector of reference cycles from stopping all streams."""

from __future__ import annotations

import asyncio
import gc

__all__ = ["collect_seldom"]

COLLECT_SECONDS = 30.0
"""Time between full collections: 0.2 s with 1,500 open streams, so less than 1 % of the time."""
YOUNG_OBJECTS = 5_000
NEVER = 1 << 30


def collect_seldom(loop: asyncio.AbstractEventLoop) -> None:
    """Leave what exists now out of all collections, and look at other objects twice: while they are young, and by the clock.

    Python runs a full collection whenever the number of old objects has grown by a quarter: ten times while 3,000 streams begin, each of
    them a pause of 0.2 to 0.35 s. And after every ten collections of young objects it looks again at what they left, 20 ms for each 110
    streams that begin. Collections of young objects go on as they are; they take a millisecond. What waits for the clock is little,
    because connections and requests are freed without a collection, but for seven objects of asyncio's transport each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, NEVER, NEVER)
    loop.call_later(COLLECT_SECONDS, _collect, loop)


def _collect(loop: asyncio.AbstractEventLoop) -> None:
    gc.collect()
    loop.call_later(COLLECT_SECONDS, _collect, loop)
