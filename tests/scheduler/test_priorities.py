"""Requests of a lower priority number start first and are preempted last; without that policy a priority is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phalanx.parallel.errors import ConfigError, RequestError
from phalanx.runtime.config import EngineConfig
from phalanx.runtime.scheduler import Scheduler

from .harness import make_prompt, make_request, make_scheduler, run_step


def submit(scheduler: Scheduler, request_id: str, priority: int, length: int = 4, **params: Any) -> None:
    first = 10 + int(request_id, 36)
    scheduler.submit(replace(make_request(request_id, make_prompt(length, first), **params), priority=priority), 0.0)


def order_of_ends(scheduler: Scheduler) -> str:
    ends = ""
    while scheduler.has_work:
        run_step(scheduler)
        ends += "".join(delta.request_id for delta in scheduler.take_deltas() if delta.finish_reason is not None)
    return ends


def test_lower_priorities_start_first_and_equal_ones_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    for request_id, priority in (("a", 3), ("b", 0), ("c", -1), ("d", 3), ("e", -1), ("f", 0)):
        submit(scheduler, request_id, priority, max_tokens=2)
    assert order_of_ends(scheduler) == "cebfad"


def test_one_that_comes_later_passes_those_that_wait_but_stops_none_that_runs() -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    submit(scheduler, "a", 1, max_tokens=3)
    submit(scheduler, "b", 1, max_tokens=3)
    run_step(scheduler)
    submit(scheduler, "c", 0, max_tokens=3)
    assert order_of_ends(scheduler) == "acb"


@pytest.mark.parametrize(("priorities", "expected"), [((0, 0), "ab"), ((0, 1), "ab"), ((1, 0), "ba")])
def test_the_last_in_order_makes_room(priorities: tuple[int, int], expected: str) -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2, policy="priority")
    for request_id, priority in zip("ab", priorities, strict=True):
        submit(scheduler, request_id, priority, length=7, max_tokens=10)
    assert order_of_ends(scheduler) == expected
    assert scheduler.stats().num_preemptions == 1


def test_one_that_was_preempted_waits_in_its_place() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2, policy="priority")
    submit(scheduler, "a", 0, length=7, max_tokens=10)
    submit(scheduler, "b", 1, length=7, max_tokens=10)
    run_step(scheduler)
    assert scheduler.stats().num_running == 2
    for request_id, priority in (("c", 2), ("d", 1), ("e", 0)):
        submit(scheduler, request_id, priority, length=12, max_tokens=8)
    assert order_of_ends(scheduler) == "aebdc"
    assert scheduler.stats().num_preemptions == 1


def test_a_priority_is_refused_where_requests_run_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    with pytest.raises(
        RequestError, match="priority=1 counts on servers with --scheduling-policy priority only"
    ) as caught:
        submit(scheduler, "a", 1)
    assert caught.value.param == "priority"
    submit(scheduler, "a", 0)


def test_requests_of_two_priorities_do_not_share_a_prompt() -> None:
    scheduler = make_scheduler(policy="priority")
    submit(scheduler, "a", 1)
    with pytest.raises(RequestError, match="another prompt, cache salt or priority"):
        scheduler.submit(make_request("b", make_prompt(4, 20), fork_from="a"), 0.0)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="--scheduling-policy=sjf is unknown; use one of fcfs, priority"):
        EngineConfig(scheduling_policy="sjf")  # type: ignore[arg-type]
