"""What is refused at the door, with value, limit and way out, and what ranks are told when a request starts."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.parallel.errors import CapacityError, ConfigError, RequestError
from phalanx.runtime.kv_cache import BlockPlanner, SlotPlanner
from phalanx.runtime.request import Request
from phalanx.runtime.scheduler import Scheduler

from .harness import CONFIG, make_prompt, make_request, make_scheduler, plan_step


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ((), {}, "prompt", "no tokens; give at least one"),
        ((5, 100), {}, "prompt", "token 1 is 100; ids of this model go from 0 to 99"),
        ((-1,), {}, "prompt", "token 0 is -1"),
        ((2**70,), {}, "prompt", "whole numbers"),
        ((1.5,), {}, "prompt", "whole numbers"),
        (make_prompt(65), {"max_tokens": 1}, "prompt", "65 tokens.*max_model_len of 64.*shorten the prompt"),
        (make_prompt(60), {"max_tokens": 5}, "max_tokens", "max_model_len of 64.*max_tokens up to 4"),
        ((5,), {"stop_token_ids": (100,)}, "stop_token_ids", "holds 100"),
    ],
)
def test_impossible_request_is_refused(
    prompt: tuple[Any, ...], params: dict[str, Any], param: str, message: str
) -> None:
    scheduler = make_scheduler()
    with pytest.raises(RequestError, match=message) as error:
        scheduler.submit(make_request("a", prompt, **params), 0.0)
    assert error.value.param == param
    assert not scheduler.has_work
    scheduler.submit(make_request("a"), 0.0)


def test_request_larger_than_the_whole_cache_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(RequestError, match=r"key/value cache's room of 16 tokens; use max_tokens up to 4"):
        scheduler.submit(make_request("a", make_prompt(12), max_tokens=5), 0.0)
    scheduler.submit(make_request("a", make_prompt(12), max_tokens=4), 0.0)


def test_same_id_twice_is_refused_while_the_first_lives() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"), 0.0)
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.submit(make_request("a"), 0.0)
    scheduler.cancel("a", 0.0)
    scheduler.submit(make_request("a"), 0.0)


def test_full_queue_is_refused_until_there_is_room() -> None:
    scheduler = make_scheduler(max_queued_requests=2, max_num_seqs=1)
    scheduler.submit(make_request("a"), 0.0)
    scheduler.submit(make_request("b"), 0.0)
    with pytest.raises(
        CapacityError, match="2 requests are waiting, the most that --max-queued-requests=2 allows; try again later"
    ):
        scheduler.submit(make_request("c"), 0.0)
    plan_step(scheduler)
    scheduler.submit(make_request("c"), 0.0)


def test_cache_with_fewer_slots_than_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=8 is above the cache's 4"):
        Scheduler(CONFIG, SlotPlanner(4, 64))


def test_sampling_parameters_reach_the_ranks_with_the_first_step() -> None:
    scheduler = make_scheduler()
    params = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "logprobs": 2, "seed": -1}
    scheduler.submit(make_request("a", **params), 0.0)
    (row,) = plan_step(scheduler).admissions
    assert row["temperature"] == pytest.approx(0.5)
    assert (row["top_k"], row["num_logprobs"], int(row["seed"])) == (3, 2, 2**64 - 1)
    assert (row["top_p"], row["min_p"]) == (pytest.approx(0.9), pytest.approx(0.1))


@pytest.mark.parametrize("top_k", [-1, 0, 100, 5000])
def test_top_k_that_keeps_every_token_is_switched_off(top_k: int) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", top_k=top_k), 0.0)
    (row,) = plan_step(scheduler).admissions
    assert (row["top_k"], row["num_logprobs"]) == (0, -1)


def drawn_seeds(seed: int) -> list[int]:
    scheduler = make_scheduler(seed=seed)
    for index in range(8):
        scheduler.submit(make_request(str(index)), 0.0)
    return [int(value) for value in plan_step(scheduler).admissions["seed"]]


def test_seeds_are_drawn_from_the_engines_seed() -> None:
    assert drawn_seeds(0) == drawn_seeds(0)
    assert len({*drawn_seeds(0), *drawn_seeds(1)}) == 16


def test_refused_request_does_not_change_the_seed_of_the_next() -> None:
    scheduler = make_scheduler()
    with pytest.raises(RequestError):
        scheduler.submit(Request("bad", ()), 0.0)
    scheduler.submit(make_request("a"), 0.0)
    assert int(plan_step(scheduler).admissions["seed"][0]) == drawn_seeds(0)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"max_queued_requests": 0},
        {"num_microbatches": 0},
        {"lookahead": 2},
    ],
)
def test_limits_that_cannot_work_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make_scheduler(**changes)


def test_numbers_follow_the_order_of_arrival() -> None:
    scheduler = Scheduler(CONFIG, BlockPlanner(8, 4, 8, 64))
    assert [scheduler.submit(make_request(name, max_tokens=1), 0.0) for name in "abc"] == [0, 1, 2]
