"""Columns and objects say the same."""

from __future__ import annotations

from .harness import EOS, make_prompt, make_request, make_scheduler, run_step


def test_plain_tokens_come_in_columns_and_ends_as_objects() -> None:
    scheduler = make_scheduler()
    numbers = {name: scheduler.submit(make_request(name, make_prompt(3, 10 + i)), 0.0) for i, name in enumerate("abc")}
    run_step(scheduler, [5, EOS, 6])
    scheduler.cancel("c", 0.0)
    (batch,) = scheduler.take_batches()
    assert batch.request_ids.tolist() == ["a", "c"]
    assert batch.numbers.tolist() == [numbers["a"], numbers["c"]]
    assert batch.token_ids.tolist() == [5, 6]
    ends = [(delta.request_id, delta.token_ids, delta.finish_reason) for delta in batch.deltas]
    assert ends == [("b", (EOS,), "stop"), ("c", (), "cancelled")]


def test_objects_follow_the_order_of_steps_with_the_end_last() -> None:
    scheduler = make_scheduler()
    for index, name in enumerate("ab"):
        scheduler.submit(make_request(name, make_prompt(3, 10 + index), max_tokens=2), 0.0)
    run_step(scheduler, [5, 6])
    run_step(scheduler, [7, 8])
    deltas = [(delta.request_id, delta.token_ids, delta.finish_reason) for delta in scheduler.take_deltas()]
    assert deltas == [("a", (5,), None), ("b", (6,), None), ("a", (7,), "length"), ("b", (8,), "length")]
    assert scheduler.take_deltas() == []
