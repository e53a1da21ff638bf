"""Requests with one prompt: it is computed once, whatever happens to the request that computes it."""

from __future__ import annotations

import pytest

from phalanx.parallel.errors import RequestError
from phalanx.runtime.kv_cache import BlockPlanner, SlotPlanner
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.step import StepLimits

from .harness import CONFIG, make_prompt, make_request, make_scheduler, plan_step, run_step

PROMPT = make_prompt(10)


def submit_group(scheduler: Scheduler, count: int = 3, **options: object) -> None:
    for index in range(count):
        scheduler.submit(
            make_request(f"r{index}", PROMPT, seed=index, fork_from="r0" if index else None, **options), 0.0
        )


def test_prompt_of_a_group_is_computed_once() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler)
    first = plan_step(scheduler)
    assert first.num_scheduled_tokens.tolist() == [10], "the others wait"
    second = plan_step(scheduler)
    assert second.seq_indices.tolist() == [1, 2]
    assert (second.starts.tolist(), second.num_scheduled_tokens.tolist()) == ([9, 9], [1, 1])
    assert second.num_sampled == 2
    assert len(second.copies) == 2
    assert scheduler.stats().prefix_hit_tokens == 18


def test_prompt_of_a_group_is_computed_once_without_prefix_sharing() -> None:
    scheduler = Scheduler(CONFIG, BlockPlanner(64, 4, CONFIG.max_num_seqs, CONFIG.max_model_len, share_prefixes=False))
    submit_group(scheduler)
    plan_step(scheduler)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [1, 1]


def test_shared_prompt_tokens_are_reported_as_cached() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler, 2)
    run_step(scheduler)
    run_step(scheduler)
    cached = {delta.request_id: delta.num_cached_tokens for delta in scheduler.take_deltas()}
    assert cached["r1"] == 9


def test_a_prompt_in_chunks_is_forked_when_the_last_chunk_is_planned() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    submit_group(scheduler, 2)
    assert [plan_step(scheduler).num_scheduled_tokens.tolist() for _ in range(3)] == [[6], [4], [1]]


def test_others_pass_those_that_wait_for_a_prompt() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler)
    scheduler.submit(make_request("other", make_prompt(5, 60)), 0.0)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [10, 5]


def test_first_of_a_group_that_is_cancelled_leaves_its_place_to_the_next() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler)
    scheduler.cancel("r0", 0.0)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [10]
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [1]


def test_first_of_a_group_hands_its_prompt_over_when_it_ends() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler, max_tokens=1)
    run_step(scheduler)
    plan = run_step(scheduler)
    assert (plan.starts.tolist(), plan.num_scheduled_tokens.tolist()) == ([9, 9], [1, 1])
    assert len(plan.admissions) == 2
    assert len(set(plan.copies[:, 1].tolist())) == 1, "both copy the block that the first has left"
    assert not scheduler.has_work


def test_an_heir_that_is_cancelled_before_its_plan_leaves_nothing() -> None:
    scheduler = make_scheduler()
    submit_group(scheduler, max_tokens=1)
    run_step(scheduler)
    scheduler.cancel("r1", 0.0)
    plan = run_step(scheduler)
    assert (plan.starts.tolist(), plan.num_scheduled_tokens.tolist()) == ([9], [1])
    assert len(plan.admissions) == 1
    assert not scheduler.has_work


def test_without_a_free_row_the_next_finds_the_full_blocks() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    submit_group(scheduler, 2, max_tokens=1)
    run_step(scheduler)
    plan = run_step(scheduler)
    assert (plan.starts.tolist(), plan.num_scheduled_tokens.tolist()) == ([8], [2])


def test_requests_that_score_their_prompt_compute_it() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", PROMPT), 0.0)
    scheduler.submit(make_request("b", PROMPT, fork_from="a", prompt_logprobs=0), 0.0)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [10, 10]


def test_requests_that_do_not_score_their_prompt_take_it_over_from_one_that_does() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", PROMPT, prompt_logprobs=0), 0.0)
    scheduler.submit(make_request("b", PROMPT, fork_from="a"), 0.0)
    assert [plan_step(scheduler).num_scheduled_tokens.tolist() for _ in range(2)] == [[10], [1]]


def test_a_request_that_has_ended_is_not_waited_for() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("b", PROMPT, fork_from="long gone"), 0.0)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [10]


@pytest.mark.parametrize(("prompt", "salt"), [(make_prompt(10, 50), ""), (PROMPT, "other")])
def test_another_prompt_or_salt_cannot_be_forked(prompt: tuple[int, ...], salt: str) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", PROMPT), 0.0)
    with pytest.raises(RequestError, match="fork_from='a' has another prompt, cache salt or priority"):
        scheduler.submit(make_request("b", prompt, fork_from="a", cache_salt=salt), 0.0)
    assert scheduler.stats().num_waiting == 1


def test_a_cache_of_slots_computes_each_prompt() -> None:
    scheduler = Scheduler(CONFIG, SlotPlanner(CONFIG.max_num_seqs, CONFIG.max_model_len))
    submit_group(scheduler, 2)
    assert [plan_step(scheduler).num_scheduled_tokens.tolist() for _ in range(2)] == [[10], [10]]


def test_prefixes_are_shared_within_a_salt_only() -> None:
    scheduler = make_scheduler()
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        scheduler.submit(make_request(request_id, PROMPT, cache_salt=salt), 0.0)
        plan_step(scheduler)
    assert scheduler.stats().prefix_hit_tokens == 8, "c found the full blocks of a, b found nothing"


def test_preempted_sequence_goes_before_younger_ones_and_after_older_ones() -> None:
    from phalanx.runtime.scheduler.admission import make_sequence
    from phalanx.runtime.scheduler.waiting import WaitingQueue

    cache = BlockPlanner(64, 4, 8, 64)
    sequences = [make_sequence(make_request(f"r{number}"), number, CONFIG, cache) for number in range(4)]
    queue = WaitingQueue()
    for number in (0, 1, 3):
        queue.append(sequences[number])
    queue.put_back(sequences[2])
    assert [sequence.number for sequence in queue] == [0, 1, 2, 3]


def test_a_plan_starts_no_more_long_prefixes_than_it_has_room_for() -> None:
    scheduler = make_scheduler(
        num_blocks=256, block_size=1, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=64
    )
    prompt = make_prompt(30)
    scheduler.submit(make_request("first", prompt), 0.0)
    run_step(scheduler)
    for index in range(6):
        scheduler.submit(make_request(f"r{index}", prompt), 0.0)
    plan = plan_step(scheduler)
    assert len(plan.admissions) == 2, "30 blocks each, and at most one sequence more than 40"
    assert len(plan.new_blocks) <= 40 + 8 + 64


def hand_over_at_once() -> Scheduler:
    """Four requests that end with their first token have just left their prompts to others, as many blocks as a plan has tokens.

    Three more wait whose prompts are known, so that they cost blocks but no tokens.
    """
    scheduler = make_scheduler(num_blocks=400, block_size=1)
    known = [make_prompt(40, first=50 + index) for index in range(3)]
    for index, prompt in enumerate(known):
        scheduler.submit(make_request(f"known{index}", prompt, max_tokens=1), 0.0)
    while scheduler.has_work:
        run_step(scheduler)
    for index in range(4):
        prompt = make_prompt(16, first=10 + index)
        scheduler.submit(make_request(f"a{index}", prompt, max_tokens=1), 0.0)
        scheduler.submit(make_request(f"b{index}", prompt, fork_from=f"a{index}"), 0.0)
    for index, prompt in enumerate(known):
        scheduler.submit(make_request(f"c{index}", prompt), 0.0)
    run_step(scheduler)
    return scheduler


def test_prompts_handed_over_at_once_and_others_that_start_fit_one_plan() -> None:
    scheduler = hand_over_at_once()
    limits = StepLimits(CONFIG.max_num_seqs, CONFIG.max_num_batched_tokens, CONFIG.max_model_len, 1, CONFIG.vocab_size)
    plan = plan_step(scheduler)
    assert len(plan.new_blocks) >= 64, "all four were handed over"
    assert len(plan.new_blocks) <= limits.max_num_seqs + limits.max_num_tokens + limits.blocks_per_seq
    assert len(plan.words) <= limits.max_plan_words


def test_prompts_handed_over_and_then_cancelled_keep_no_other_out() -> None:
    scheduler = hand_over_at_once()
    for index in range(4):
        scheduler.cancel(f"b{index}", 0.0)
    assert scheduler.plan(0.0) is not None
