"""Full garbage collections of the HTTP process run by the clock, not whenever many streams begin."""

from __future__ import annotations

import asyncio
import gc

from phalanx.runtime.server.garbage import collect_seldom


def test_many_new_objects_cause_no_full_collection() -> None:
    before, loop, full = gc.get_threshold(), asyncio.new_event_loop(), []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.append(phase)

    try:
        collect_seldom(loop)
        assert gc.get_freeze_count() > 0
        gc.callbacks.append(note)
        kept = [[number] for number in range(300_000)]
        assert len(kept) == 300_000
        assert full == []
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
        gc.set_threshold(*before)
        loop.close()
