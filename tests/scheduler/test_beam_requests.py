"""Requests of a beam search from submission to their end: the leader, the followers, and answers that are missing."""

from __future__ import annotations

from phalanx.runtime.scheduler import Scheduler

from .harness import make_request, make_scheduler


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
