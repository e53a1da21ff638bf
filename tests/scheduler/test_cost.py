"""A step in steady decoding does no Python work per sequence."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest

from phalanx.runtime.step.times import StepTimes

from .harness import make_prompt, make_request, make_result, make_scheduler, plan_step


def count_calls(work: Callable[[], object]) -> int:
    """Calls of Python and built-in functions, without those of a garbage collection that happens to fall into it."""
    events = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal events
        events += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events


STEP_TIMES = StepTimes(2, (1, 256), (5e-3, 6e-3), (1e-2, 1.2e-2))


def calls_of_a_step(num_seqs: int, lookahead: int, num_microbatches: int = 1) -> int:
    scheduler = make_scheduler(
        num_blocks=4 * num_seqs,
        block_size=16,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8 * num_seqs,
        max_queued_requests=num_seqs,
        lookahead=lookahead,
        num_microbatches=num_microbatches,
        step_times=STEP_TIMES if num_microbatches > 1 else None,
    )
    for index in range(num_seqs):
        scheduler.submit(make_request(f"r{index}", make_prompt(4, 2 + index % 90), max_tokens=50), 0.0)
    results = []
    while (plan := scheduler.plan(0.0)) is not None:
        results.append(make_result(plan))

    def step() -> None:
        scheduler.apply(results.pop(0), 0.0)
        scheduler.take_batches()
        results.append(make_result(plan_step(scheduler)))
        if num_microbatches > 1:
            assert scheduler.plan(0.0) is None, "the engine asks for one more than there are micro-batches"

    for _ in range(5):
        step()
    return count_calls(step)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_work_of_a_step_does_not_grow_with_the_number_of_sequences(lookahead: int) -> None:
    assert calls_of_a_step(16, lookahead) == calls_of_a_step(256, lookahead) < 300


def test_nor_does_the_choice_of_micro_batches() -> None:
    assert calls_of_a_step(16, 0, num_microbatches=3) == calls_of_a_step(256, 0, num_microbatches=3) < 300
