"""Blocks that run out, sequences that are computed again, and prefixes that are shared."""

from __future__ import annotations

import numpy as np

from phalanx.runtime.kv_cache import SlotPlanner
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.step import RowKind

from .harness import CONFIG, make_prompt, make_request, make_result, make_scheduler, plan_step, run_step


def crowded() -> Scheduler:
    """Two sequences of 7 tokens each in 5 blocks of 4: both fit, but not for long."""
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2)
    scheduler.submit(make_request("old", make_prompt(7, 10), max_tokens=12, seed=1), 0.0)
    scheduler.submit(make_request("young", make_prompt(7, 50), max_tokens=8, seed=2), 0.0)
    return scheduler


def test_youngest_sequence_makes_room_and_is_computed_again_with_its_own_tokens() -> None:
    scheduler = crowded()
    tokens = iter(range(60, 99))
    generated: list[int] = []
    while scheduler.stats().num_preemptions == 0:
        generated = [
            delta.token_ids[0] for delta in scheduler.take_deltas() if delta.request_id == "young"
        ] or generated
        plan = plan_step(scheduler)
        samples = [next(tokens) for _ in range(plan.num_sampled)]
        scheduler.apply(make_result(plan, samples), 0.0)
    assert plan.seq_indices.tolist() == [0], "the older one goes on"
    assert scheduler.stats().num_waiting == 1
    scheduler.cancel("old", 0.0)
    scheduler.take_deltas()
    again = plan_step(scheduler)
    (row,) = again.admissions
    assert int(row["seed"]) == 2
    assert again.num_sampled == 1
    known = int(again.starts[0]) + int(again.num_scheduled_tokens[0])
    assert known > 7, "generated tokens are part of what is computed again"
    start = int(again.starts[0])
    prompt = make_prompt(7, 50)
    assert again.token_ids.tolist()[: max(7 - start, 0)] == list(prompt[start:])
    assert again.token_ids.tolist()[-1] == generated[-1]


def test_every_sequence_ends_by_length_in_a_cache_that_is_too_small() -> None:
    scheduler = crowded()
    num_tokens = {"old": 0, "young": 0}
    reasons = {}
    while scheduler.has_work:
        run_step(scheduler)
        for delta in scheduler.take_deltas():
            num_tokens[delta.request_id] += len(delta.token_ids)
            reasons[delta.request_id] = delta.finish_reason
    assert num_tokens == {"old": 12, "young": 8}
    assert reasons == {"old": "length", "young": "length"}
    assert scheduler.stats().num_preemptions >= 1


def test_nothing_is_admitted_into_the_last_blocks_that_running_sequences_need() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("a", make_prompt(8, 10), max_tokens=4), 0.0)
    scheduler.submit(make_request("b", make_prompt(8, 50), max_tokens=4), 0.0)
    assert plan_step(scheduler).seq_indices.tolist() == [0]


def test_lone_sequence_may_use_the_whole_cache() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("a", make_prompt(15), max_tokens=1), 0.0)
    assert plan_step(scheduler).num_tokens == 15


def test_prefix_is_shared_by_the_next_step_but_not_within_one() -> None:
    scheduler = make_scheduler()
    prompt = make_prompt(9)
    for name in "ab":
        scheduler.submit(make_request(name, prompt), 0.0)
    assert plan_step(scheduler).num_scheduled_tokens.tolist() == [9, 9]
    scheduler.submit(make_request("c", prompt), 0.0)
    plan = plan_step(scheduler)
    assert (plan.starts.tolist(), plan.num_scheduled_tokens.tolist()) == ([8], [1])
    stats = scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (27, 8)


def test_cached_tokens_are_reported_with_the_first_token() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.submit(make_request(name, make_prompt(9)), 0.0)
        run_step(scheduler)
    run_step(scheduler)
    cached = [(delta.request_id, delta.num_cached_tokens) for delta in scheduler.take_deltas()]
    assert cached == [("a", 0), ("a", 0), ("b", 8), ("a", 0), ("b", 0)]


def test_generated_tokens_are_shared_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler()
    prompt = make_prompt(6)
    scheduler.submit(make_request("turn 1", prompt, max_tokens=5), 0.0)
    while scheduler.has_work:
        run_step(scheduler, 5)
    scheduler.submit(make_request("turn 2", (*prompt, 5, 5, 5, 5, 5, 60, 61)), 0.0)
    assert plan_step(scheduler).starts.tolist() == [8], "10 of the 11 tokens were computed, 2 full blocks of 4"


def test_prompt_scores_need_every_prompt_token_computed() -> None:
    scheduler = make_scheduler()
    prompt = make_prompt(9)
    scheduler.submit(make_request("a", prompt), 0.0)
    run_step(scheduler)
    scheduler.submit(make_request("b", prompt, prompt_logprobs=1), 0.0)
    plan = plan_step(scheduler)
    assert plan.num_scheduled_tokens.tolist() == [1, 9]
    assert (plan.rows[2:].tolist(), plan.targets[2:].tolist()) == (list(range(1, 9)), list(prompt[1:]))
    assert plan.kinds.tolist() == [RowKind.SAMPLE] * 2 + [RowKind.SCORE] * 8
    assert plan.num_alternatives == 1


def test_fixed_slots_never_run_out() -> None:
    scheduler = Scheduler(CONFIG, SlotPlanner(CONFIG.max_num_seqs, CONFIG.max_model_len))
    for index in range(8):
        scheduler.submit(make_request(f"r{index}", make_prompt(32), max_tokens=32), 0.0)
    blocks = []
    while scheduler.has_work:
        blocks.append(run_step(scheduler).new_blocks)
    assert np.concatenate(blocks).tolist() == [[0, seq_index, 0, seq_index] for seq_index in range(8)]
    assert scheduler.stats().num_preemptions == 0
