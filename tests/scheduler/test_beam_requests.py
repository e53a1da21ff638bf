"""Requests of a beam search from submission to their end: the leader, the followers, and answers that are missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from phalanx.runtime.kv_cache import SlotPlanner
from phalanx.runtime.request import TokenDelta
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.step import StepPlan, StepResult

from .harness import CONFIG, make_prompt, make_request, make_result, make_scheduler, plan_step


def submit_search(scheduler: Scheduler, num_requests: int, deadline: float | None = None, **params: object) -> None:
    """Requests ``a``, ``b``, ... that share the answers of one search."""
    for name in "abcdefgh"[:num_requests]:
        fork_from = None if name == "a" else "a"
        scheduler.submit(make_request(name, deadline=deadline, fork_from=fork_from, **params), 0.0)


def test_leader_and_followers_of_one_deadline_all_end_at_it() -> None:
    scheduler = make_scheduler()
    submit_search(scheduler, 3, deadline=1.0, beam_width=3)
    assert scheduler.plan(2.0) is None
    deltas = scheduler.take_deltas()
    assert {delta.request_id: delta.finish_reason for delta in deltas} == dict.fromkeys("abc", "error")
    assert len(deltas) == 3
    assert not scheduler.has_work


def search_of_one_token(beam_width: int) -> Scheduler:
    """A search that is over before the requests of its other choices have come."""
    scheduler = make_scheduler(vocab_size=8)
    leader = make_request("a", prompt=(4, 5), beam_width=beam_width, max_tokens=1)
    scheduler.submit(replace(leader, num_followers=beam_width - 1), 0.0)
    scheduler.apply(result_with(plan_step(scheduler), [2, 3, 4, 5]), 0.0)
    return scheduler


def test_answers_wait_for_requests_of_a_search_that_come_after_its_end() -> None:
    """A burst of requests is read over several steps, and a search of one token takes one."""
    scheduler = search_of_one_token(beam_width=3)
    assert scheduler.plan(0.0) is None
    assert scheduler.take_deltas() == []
    assert scheduler.has_work
    for name in "bc":
        scheduler.submit(make_request(name, prompt=(4, 5), beam_width=3, max_tokens=1, fork_from="a"), 0.0)
    deltas = {delta.request_id: delta.token_ids for delta in scheduler.take_deltas()}
    assert deltas == {"a": (2,), "b": (3,), "c": (4,)}
    assert not scheduler.has_work


def test_search_that_waits_for_requests_can_be_cancelled() -> None:
    scheduler = search_of_one_token(beam_width=2)
    scheduler.cancel("a", 0.0)
    assert [delta.finish_reason for delta in scheduler.take_deltas()] == ["cancelled"]
    assert not scheduler.has_work


def run_search(scheduler: Scheduler, top_ids: list[int]) -> dict[str, TokenDelta]:
    """Give every beam these candidates, each half as probable as the one before it, until the search ends."""
    for _ in range(20):
        if not scheduler.has_work:
            break
        scheduler.apply(result_with(plan_step(scheduler), top_ids), 0.0)
    deltas = scheduler.take_deltas()
    assert len({delta.request_id for delta in deltas}) == len(deltas)
    return {delta.request_id: delta for delta in deltas}


def result_with(plan: StepPlan, top_ids: list[int]) -> StepResult:
    top_logprobs = np.log(0.5) * np.arange(1, len(top_ids) + 1, dtype=np.float32)
    result = make_result(plan, top_ids[0])
    result.logprobs = np.zeros(len(result.token_ids), np.float32)
    result.top_ids = np.tile(np.array(top_ids, np.int32), (len(result.token_ids), 1))
    result.top_logprobs = np.tile(top_logprobs, (len(result.token_ids), 1))
    return result


def test_requests_end_where_the_vocabulary_has_fewer_answers_than_beams() -> None:
    scheduler = make_scheduler(vocab_size=3)
    submit_search(scheduler, 4, prompt=(0, 2), beam_width=4, max_tokens=1)
    deltas = run_search(scheduler, [2, 0, 1])
    assert [deltas[name].token_ids for name in "abc"] == [(2,), (0,), (1,)]
    assert deltas["d"].finish_reason == "error"
    assert "has 3 answers" in str(deltas["d"].error)
    assert not scheduler.has_work


def test_search_without_any_answer_ends_with_an_error() -> None:
    """Every token of the vocabulary is an end token, and none may come before ``min_tokens``."""
    scheduler = make_scheduler(vocab_size=3)
    submit_search(scheduler, 2, prompt=(0, 2), beam_width=2, max_tokens=4, min_tokens=1, stop_token_ids=(0, 2))
    deltas = run_search(scheduler, [2, 0, 1])
    assert [deltas[name].finish_reason for name in "ab"] == ["error", "error"]
    assert "has 0 answers" in str(deltas["a"].error)
    assert not scheduler.has_work


def test_followers_have_the_prompt_logprobs_too() -> None:
    scheduler = make_scheduler(vocab_size=8)
    submit_search(scheduler, 2, prompt=(4, 5, 6), beam_width=2, max_tokens=2, prompt_logprobs=0)
    deltas = run_search(scheduler, [2, 3, 4, 5])
    assert deltas["a"].prompt_logprobs is not None
    assert len(deltas["a"].prompt_logprobs) == 3
    assert deltas["b"].prompt_logprobs == deltas["a"].prompt_logprobs


def test_beam_that_computes_its_prompt_again_comes_before_a_younger_prompt() -> None:
    """In slots a fork shares nothing. Its row may be above that of a younger request, whose prompt is long."""
    config = replace(CONFIG, max_num_seqs=3, max_num_batched_tokens=4)
    scheduler = Scheduler(config, SlotPlanner(3, config.max_model_len))
    submit_search(scheduler, 1, prompt=make_prompt(4), beam_width=2, max_tokens=4)
    first = plan_step(scheduler)
    scheduler.submit(make_request("young", make_prompt(40, first=30)), 0.0)
    assert plan_step(scheduler).seq_indices.tolist() == [1]
    scheduler.apply(result_with(first, [5, 6, 7, 8]), 0.0)
    assert plan_step(scheduler).seq_indices.tolist() == [0, 2]
    scheduler.apply(StepResult(1, np.empty(0, np.int32)), 0.0)
    assert plan_step(scheduler).seq_indices.tolist() == [2, 1]
