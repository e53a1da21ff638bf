"""How requests end: end tokens, length, cancellation, deadlines, broken numbers, and requests that only score."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.runtime.kv_cache import SlotPlanner
from phalanx.runtime.request import TokenDelta
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.scheduler.admission import make_sequence
from phalanx.runtime.scheduler.waiting import Deadlines
from phalanx.runtime.step import StepResult

from .harness import CONFIG, EOS, make_prompt, make_request, make_result, make_scheduler, plan_step, run_step


def run_tokens(scheduler: Scheduler, token_ids: list[int]) -> list[TokenDelta]:
    """Give the only request these tokens as far as it takes them."""
    deltas: list[TokenDelta] = []
    for token in token_ids:
        run_step(scheduler, token)
        deltas += scheduler.take_deltas()
        if not scheduler.has_work:
            break
    return deltas


@pytest.mark.parametrize(
    ("params", "token_ids", "num_taken", "reason", "stop_reason"),
    [
        ({}, [5, EOS, 6], 2, "stop", None),
        ({"ignore_eos": True, "max_tokens": 3}, [5, EOS, 6], 3, "length", None),
        ({"stop_token_ids": (6,)}, [5, 6, 7], 2, "stop", 6),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, [EOS], 1, "stop", EOS),
        ({"stop_token_ids": (8, 9, 6)}, [5, 6], 2, "stop", 6),
        ({"min_tokens": 2}, [EOS, EOS, EOS, 5], 3, "stop", None),
        ({"min_tokens": 2, "max_tokens": 2}, [EOS, EOS], 2, "length", None),
        ({"max_tokens": 2}, [5, EOS], 2, "stop", None),
        ({"max_tokens": 1}, [5], 1, "length", None),
    ],
)
def test_generation_ends_with_a_true_reason(
    params: dict[str, object], token_ids: list[int], num_taken: int, reason: str, stop_reason: int | None
) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", **params), 0.0)
    deltas = run_tokens(scheduler, token_ids)
    assert [delta.token_ids for delta in deltas] == [(token,) for token in token_ids[:num_taken]]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (num_taken - 1)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (reason, stop_reason)


def test_stop_tokens_of_an_earlier_request_do_not_end_the_next_in_its_slot() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_request("a", stop_token_ids=(6, 7)), 0.0)
    run_tokens(scheduler, [6])
    scheduler.submit(make_request("b", make_prompt(3, 40), max_tokens=3), 0.0)
    assert [delta.token_ids for delta in run_tokens(scheduler, [6, 7, 6])] == [(6,), (7,), (6,)]


def test_cancelling_a_waiting_request_ends_it_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_request("a"), 0.0)
    scheduler.submit(make_request("b"), 0.0)
    run_step(scheduler)
    scheduler.cancel("b", 0.0)
    (first, second) = scheduler.take_deltas()
    assert first.request_id == "a"
    assert (second.request_id, second.finish_reason, second.error) == ("b", "cancelled", None)
    assert scheduler.stats().num_waiting == 0


def test_cancelling_in_flight_frees_slot_and_blocks_and_drops_the_result() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"), 0.0)
    plan = plan_step(scheduler)
    scheduler.cancel("a", 0.0)
    assert (scheduler.stats().num_running, scheduler.stats().kv_blocks_used) == (0, 0)
    assert scheduler.has_work, "the step in flight still has to be collected"
    scheduler.apply(make_result(plan), 0.0)
    assert [(delta.token_ids, delta.finish_reason) for delta in scheduler.take_deltas()] == [((), "cancelled")]
    assert not scheduler.has_work


def test_unknown_and_ended_ids_are_ignored_by_cancel() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=1), 0.0)
    run_step(scheduler)
    scheduler.take_deltas()
    scheduler.cancel("a", 0.0)
    scheduler.cancel("never seen", 0.0)
    assert scheduler.take_deltas() == []


def test_deadline_ends_waiting_and_running_requests_with_an_error_that_says_so() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_request("running", deadline=5.0), 0.0)
    scheduler.submit(make_request("waiting", deadline=5.0), 0.0)
    scheduler.submit(make_request("patient", make_prompt(3, 40), deadline=50.0), 0.0)
    run_step(scheduler, now=1.0)
    scheduler.take_deltas()
    plan = plan_step(scheduler, now=5.0)
    ended = scheduler.take_deltas()
    assert [(delta.request_id, delta.finish_reason) for delta in ended] == [("running", "error"), ("waiting", "error")]
    assert all(delta.error is not None and "deadline" in delta.error for delta in ended)
    assert plan.token_ids.tolist() == list(make_prompt(3, 40))


def test_deadline_passes_while_a_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", deadline=5.0), 0.0)
    plan = plan_step(scheduler, now=4.0)
    scheduler.apply(make_result(plan, 7), 6.0)
    assert [delta.token_ids for delta in scheduler.take_deltas()] == [(7,), ()]
    assert not scheduler.has_work


def test_deadline_of_an_ended_request_does_not_touch_its_namesake() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", deadline=5.0), 0.0)
    scheduler.cancel("a", 1.0)
    scheduler.submit(make_request("a"), 2.0)
    scheduler.take_deltas()
    run_step(scheduler, now=9.0)
    assert [delta.finish_reason for delta in scheduler.take_deltas()] == [None]


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    deadlines = Deadlines()
    lasting = make_sequence(make_request("lasting"), 0, CONFIG, SlotPlanner(8, 64))
    deadlines.add(1000.0, lasting)
    for number in range(1, 1000):
        sequence = make_sequence(make_request(str(number)), number, CONFIG, SlotPlanner(8, 64))
        deadlines.add(2000.0 - number, sequence)
        sequence.has_ended = True
    assert len(deadlines) < 200
    assert list(deadlines.take_overdue(999.0)) == []
    assert list(deadlines.take_overdue(5000.0)) == [lasting]


def test_logits_that_are_not_finite_end_one_request_and_leave_nothing_to_share() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("broken", make_prompt(9, 10)), 0.0)
    scheduler.submit(make_request("fine", make_prompt(9, 40)), 0.0)
    run_step(scheduler, [-1, 6])
    deltas = {delta.request_id: delta for delta in scheduler.take_deltas()}
    assert (deltas["broken"].finish_reason, deltas["broken"].token_ids) == ("error", ())
    assert deltas["broken"].error is not None
    assert "not finite" in deltas["broken"].error
    assert (deltas["fine"].finish_reason, deltas["fine"].token_ids) == (None, (6,))
    scheduler.submit(make_request("again", make_prompt(9, 10)), 0.0)
    plan = run_step(scheduler)
    assert plan.num_scheduled_tokens.tolist() == [1, 9], "the whole prompt is computed anew"


def test_request_for_no_tokens_ends_without_a_step() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=0), 0.0)
    (delta,) = scheduler.take_deltas()
    assert (delta.token_ids, delta.finish_reason) == ((), "length")
    assert not scheduler.has_work


def score(scheduler: Scheduler) -> list[TokenDelta]:
    """Run to the end with row log-probabilities -1, -2, ... over all prompt rows."""
    deltas: list[TokenDelta] = []
    row = 0
    while scheduler.has_work:
        plan = plan_step(scheduler)
        num_rows = len(plan.rows) - plan.num_sampled
        values = np.arange(row + 1, row + num_rows + 1, dtype=np.float32) * -1
        row += num_rows
        result = make_result(plan)
        result.logprobs = np.concatenate((np.full(plan.num_sampled, -50, np.float32), values))
        result.top_ids, result.top_logprobs = (
            np.zeros((len(plan.rows), 0), np.int32),
            np.zeros((len(plan.rows), 0), np.float32),
        )
        scheduler.apply(result, 0.0)
        deltas += scheduler.take_deltas()
    return deltas


@pytest.mark.parametrize("budget", [1, 2, 3, 64])
def test_prompt_is_scored_without_generating(budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    scheduler.submit(make_request("a", (10, 11, 12, 13), max_tokens=0, prompt_logprobs=0), 0.0)
    (delta,) = score(scheduler)
    assert (delta.token_ids, delta.finish_reason) == ((), "length")
    assert delta.prompt_logprobs is not None
    assert delta.prompt_logprobs[0] is None
    scored = [(entry.token_id, entry.logprob) for entry in delta.prompt_logprobs if entry is not None]
    assert scored == [(11, -1.0), (12, -2.0), (13, -3.0)]


def test_a_request_for_nothing_ends_at_once_and_that_is_news() -> None:
    """An idle engine has to tell of it: no step will."""
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", (10, 11), max_tokens=0), 0.0)
    assert (scheduler.has_work, scheduler.has_news) == (False, True)
    (delta,) = scheduler.take_deltas()
    assert (delta.token_ids, delta.finish_reason) == ((), "length")
    assert not scheduler.has_news


def test_one_token_prompt_has_nothing_to_score() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", (10,), max_tokens=0, prompt_logprobs=0), 0.0)
    (delta,) = scheduler.take_deltas()
    assert delta.prompt_logprobs == (None,)


def test_prompt_scores_come_with_the_first_token_only() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    scheduler.submit(make_request("a", (10, 11, 12, 13), max_tokens=2, prompt_logprobs=0), 0.0)
    first, second = score(scheduler)
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == 4
    assert second.prompt_logprobs is None


def test_scores_that_are_not_numbers_end_the_request_with_an_error() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", (10, 11), max_tokens=0, prompt_logprobs=0), 0.0)
    plan = plan_step(scheduler)
    nan = np.full(1, np.nan, np.float32)
    empty = np.zeros((1, 0), np.int32)
    scheduler.apply(StepResult(plan.step_id, plan.targets, nan, empty, empty.astype(np.float32)), 0.0)
    (delta,) = scheduler.take_deltas()
    assert delta.finish_reason == "error"
    assert delta.prompt_logprobs is None
