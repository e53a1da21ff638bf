"""Which sequences a step computes: in-flight batching, chunked prefill, micro-batches, one step ahead."""

from __future__ import annotations

import pytest

from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.step import PENDING_TOKEN, StepPlan

from .harness import make_prompt, make_request, make_result, make_scheduler, plan_step, run_step, sampling_seqs


def submit_many(scheduler: Scheduler, count: int, prompt_length: int = 3, **params: int) -> None:
    for index in range(count):
        scheduler.submit(make_request(f"r{index}", make_prompt(prompt_length, 10 + index), **params), 0.0)


def test_finished_sequence_leaves_and_a_new_one_joins_in_the_next_step() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.submit(make_request("short", make_prompt(4, 10), max_tokens=1), 0.0)
    scheduler.submit(make_request("long", make_prompt(4, 20)), 0.0)
    scheduler.submit(make_request("next", make_prompt(4, 30)), 0.0)
    first = run_step(scheduler)
    assert (first.seq_indices.tolist(), first.num_scheduled_tokens.tolist()) == ([0, 1], [4, 4])
    second = run_step(scheduler)
    assert second.seq_indices.tolist() == [1, 0]
    assert second.num_scheduled_tokens.tolist() == [1, 4]
    assert second.token_ids.tolist() == [5, *make_prompt(4, 30)]
    assert second.admissions["seq_index"].tolist() == [0]


def test_prompt_is_computed_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.submit(make_request("a", make_prompt(2)), 0.0)
    run_step(scheduler)
    scheduler.submit(make_request("b", make_prompt(12, 30)), 0.0)
    plans = [run_step(scheduler) for _ in range(4)]
    assert [plan.num_scheduled_tokens.tolist() for plan in plans] == [[1, 5], [1, 5], [1, 2], [1, 1]]
    assert [len(sampling_seqs(plan)) for plan in plans] == [1, 1, 2, 2]
    assert [plan.starts.tolist()[1] for plan in plans] == [0, 5, 10, 12]


def test_chunk_of_one_token_comes_with_the_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=7)
    scheduler.submit(make_request("a", make_prompt(8, 10)), 0.0)
    run_step(scheduler)
    scheduler.submit(make_request("b", make_prompt(5, 20)), 0.0)
    plan = run_step(scheduler)
    assert plan.num_scheduled_tokens.tolist() == [1, 5]
    assert plan.num_sampled == 2
    assert plan.num_decodes == 1


def test_oldest_request_starts_first_and_nobody_overtakes() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=4)
    scheduler.submit(make_request("a", make_prompt(16, 10)), 0.0)
    scheduler.submit(make_request("too large now", make_prompt(20, 20)), 0.0)
    scheduler.submit(make_request("small", make_prompt(2, 50), max_tokens=1), 0.0)
    assert plan_step(scheduler).seq_indices.tolist() == [0]
    assert scheduler.stats().num_waiting == 2


def test_budget_smaller_than_the_decodes_goes_round() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3, max_num_seqs=5)
    submit_many(scheduler, 5, prompt_length=1, max_tokens=20)
    for plan in fill_pipe(scheduler, depth=2):  # two plans in flight admit more than one plan could decode
        scheduler.apply(make_result(plan), 0.0)
    assert scheduler.stats().num_running == 5
    planned = [seq_index for _ in range(5) for seq_index in run_step(scheduler).seq_indices.tolist()]
    assert sorted(planned) == sorted([0, 1, 2, 3, 4] * 3)


def fill_pipe(scheduler: Scheduler, depth: int = 20) -> list[StepPlan]:
    """Plans that can be made without a result, at most ``depth``."""
    plans: list[StepPlan] = []
    while len(plans) < depth and (plan := scheduler.plan(0.0)) is not None:
        plans.append(plan)
    return plans


@pytest.mark.parametrize("num_microbatches", [2, 3, 4])
def test_pipe_stays_full_with_equal_groups_of_different_sequences(num_microbatches: int) -> None:
    scheduler = make_scheduler(num_microbatches=num_microbatches, max_num_seqs=8)
    submit_many(scheduler, 8, max_tokens=30)
    in_flight = fill_pipe(scheduler)
    for _ in range(12):
        assert len(in_flight) == num_microbatches
        seq_indices = [seq_index for plan in in_flight for seq_index in plan.seq_indices.tolist()]
        assert sorted(seq_indices) == list(range(8)), "each sequence is in exactly one plan"
        sizes = [plan.num_seqs for plan in in_flight]
        assert max(sizes) - min(sizes) <= -(-8 // num_microbatches) - 8 // num_microbatches + 1
        scheduler.apply(make_result(in_flight.pop(0)), 0.0)
        in_flight += fill_pipe(scheduler)


def test_groups_level_out_after_one_of_them_shrank() -> None:
    scheduler = make_scheduler(num_microbatches=2, max_num_seqs=8)
    submit_many(scheduler, 8, max_tokens=40)
    in_flight = fill_pipe(scheduler, depth=2)
    for seq_index in in_flight[0].seq_indices.tolist()[:3]:
        scheduler.cancel(f"r{seq_index}", 0.0)
    for _ in range(4):
        scheduler.apply(make_result(in_flight.pop(0)), 0.0)
        in_flight += fill_pipe(scheduler, depth=1)
    assert sorted(plan.num_seqs for plan in in_flight) == [2, 3]


def test_long_prompt_fills_the_pipe_with_its_chunks() -> None:
    scheduler = make_scheduler(num_microbatches=3, max_num_batched_tokens=4)
    scheduler.submit(make_request("a", make_prompt(12)), 0.0)
    plans = fill_pipe(scheduler)
    assert [plan.starts.tolist() for plan in plans] == [[0], [4], [8]]
    assert [plan.num_sampled for plan in plans] == [0, 0, 1]


def test_token_in_flight_is_pending_one_step_ahead() -> None:
    scheduler = make_scheduler(lookahead=1)
    scheduler.submit(make_request("a", (10, 11), max_tokens=3), 0.0)
    prefill, decode, *more = fill_pipe(scheduler)
    assert more == []
    assert (decode.starts.tolist(), decode.token_ids.tolist()) == ([2], [PENDING_TOKEN])
    scheduler.apply(make_result(prefill, 7), 0.0)
    (last,) = fill_pipe(scheduler)
    assert (last.starts.tolist(), last.token_ids.tolist()) == ([3], [PENDING_TOKEN])
    scheduler.apply(make_result(decode, 8), 0.0)
    assert fill_pipe(scheduler) == [], "the end by length is known beforehand: nothing is computed in vain"
    scheduler.apply(make_result(last, 9), 0.0)
    assert [delta.token_ids for delta in scheduler.take_deltas()] == [(7,), (8,), (9,)]
    assert not scheduler.has_work


def test_without_lookahead_nothing_is_planned_before_the_token_is_known() -> None:
    scheduler = make_scheduler(lookahead=0)
    scheduler.submit(make_request("a"), 0.0)
    (prefill,) = fill_pipe(scheduler)
    scheduler.apply(make_result(prefill, 7), 0.0)
    assert plan_step(scheduler).token_ids.tolist() == [7]


def test_step_planned_ahead_of_an_end_token_is_passed_over() -> None:
    scheduler = make_scheduler(lookahead=1, max_num_seqs=1)
    scheduler.submit(make_request("a", make_prompt(3, 10)), 0.0)
    scheduler.submit(make_request("b", make_prompt(3, 20)), 0.0)
    prefill, ahead = plan_step(scheduler), plan_step(scheduler)
    scheduler.apply(make_result(prefill, 1), 0.0)
    other = plan_step(scheduler)
    assert other.seq_indices.tolist() == ahead.seq_indices.tolist(), (
        "the row is taken again while the old step is in flight"
    )
    scheduler.apply(make_result(ahead, 6), 0.0)
    scheduler.apply(make_result(other, 7), 0.0)
    deltas = [(delta.request_id, delta.token_ids, delta.finish_reason) for delta in scheduler.take_deltas()]
    assert deltas == [("a", (1,), "stop"), ("b", (7,), None)]


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_result_that_does_not_belong_to_the_oldest_plan_is_an_executor_error(num_tokens: int) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"), 0.0)
    plan = plan_step(scheduler)
    wrong = make_result(plan)
    wrong.step_id += 1
    with pytest.raises(ExecutorError, match="got step 1 with 1 rows, but step 0 with 1 rows is next"):
        scheduler.apply(wrong, 0.0)
