"""A burst of requests begins a few at a time, and nothing else waits for it."""

from __future__ import annotations

import asyncio

from phalanx.runtime.server.turnstile import Turnstile


def test_a_burst_passes_in_order_a_few_in_each_turn_of_the_loop() -> None:
    async def burst() -> list[tuple[int, int]]:
        turnstile, turn, passed = Turnstile(per_turn=3), 0, []

        async def request(number: int) -> None:
            await turnstile.enter()
            passed.append((number, turn))

        requests = [asyncio.create_task(request(number)) for number in range(20)]
        while not all(task.done() for task in requests):
            turn += 1
            await asyncio.sleep(0)
        return passed

    passed = asyncio.run(burst())
    assert [number for number, _ in passed] == list(range(20))
    turns = [turn for _, turn in passed]
    assert max(map(turns.count, turns)) <= 3


def test_those_that_leave_while_they_wait_hold_up_no_others() -> None:
    async def burst() -> list[int]:
        turnstile, passed = Turnstile(per_turn=1), []

        async def request(number: int) -> None:
            await turnstile.enter()
            passed.append(number)

        requests = [asyncio.create_task(request(number)) for number in range(6)]
        await asyncio.sleep(0)
        requests[3].cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        return passed

    assert asyncio.run(burst()) == [0, 1, 2, 4, 5]
