"""Into how many micro-batches sequences are divided: what the measured times say, and how the scheduler follows."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.scheduler.microbatches import PLANNING_SECONDS, num_microbatches
from phalanx.runtime.step import StepPlan
from phalanx.runtime.step.times import StepTimes

from .harness import make_prompt, make_request, make_result, make_scheduler

ROWS = (1, 8, 64, 256)


def line(
    num_stages: int, weights: float, per_seq: float, way: float, rows: tuple[int, ...] = ROWS, imbalance: float = 1.0
) -> StepTimes:
    """Stages that take ``weights`` plus ``per_seq`` for each sequence, and ``way`` more between the hosts and them."""
    stages = [weights + per_seq * count for count in rows]
    latencies = [way + (num_stages - 1 + 1 / imbalance) * stage for stage in stages]
    return StepTimes(num_stages, rows, tuple(stages), tuple(latencies))


def choose(num_seqs: int, most: int, times: StepTimes) -> int:
    return int(num_microbatches(np.array([num_seqs]), most, times)[0])


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_weights_are_not_read_once_more_to_hide_a_short_way(num_stages: int) -> None:
    times = line(num_stages, weights=5e-3, per_seq=1e-5, way=3e-4)
    assert choose(128, num_stages + 1, times) == num_stages


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_long_way_is_hidden_by_one_more(num_stages: int) -> None:
    times = line(num_stages, weights=5e-4, per_seq=1e-5, way=1e-3)
    assert choose(128, num_stages + 1, times) == num_stages + 1


def test_time_by_sequences_alone_has_one_more() -> None:
    """Without weights to read, a smaller step is a shorter one."""
    assert choose(128, 3, line(2, weights=0.0, per_seq=1e-4, way=1e-4)) == 3


def test_flat_times_and_no_way_have_as_many_as_stages() -> None:
    assert choose(128, 5, line(4, weights=5e-3, per_seq=0.0, way=0.0)) == 4


def test_planning_counts_as_part_of_the_way() -> None:
    """One more pays from where way and planning together are longer than reading the weights."""
    weights = 1.5 * PLANNING_SECONDS
    assert choose(128, 3, line(2, weights, per_seq=1e-5, way=0.3 * PLANNING_SECONDS)) == 2
    assert choose(128, 3, line(2, weights, per_seq=1e-5, way=0.7 * PLANNING_SECONDS)) == 3


def test_host_that_plans_longer_than_a_stage_computes_gets_no_more_to_plan() -> None:
    times = line(2, weights=PLANNING_SECONDS / 4, per_seq=0.0, way=PLANNING_SECONDS)
    assert choose(128, 3, times) == 2


def test_number_changes_where_the_weights_stop_to_dominate() -> None:
    """Up to 64 sequences a step costs the same, from there on the matrix units are full."""
    times = StepTimes(2, (1, 64, 512), (1e-3, 1e-3, 8e-3), (2.5e-3, 2.5e-3, 16.5e-3))
    numbers = [choose(num_seqs, 3, times) for num_seqs in (2, 64, 128, 1024)]
    assert numbers == [2, 2, 2, 3]


def test_one_sequence_and_none_have_a_number() -> None:
    times = line(3, weights=1e-3, per_seq=1e-6, way=1e-4)
    assert [choose(num_seqs, 4, times) for num_seqs in (0, 1)] == [3, 3]


def test_fewer_in_flight_than_stages_is_what_is_taken() -> None:
    assert choose(64, 2, line(4, weights=1e-3, per_seq=1e-6, way=1e-4)) == 2


seconds = st.floats(0, 1e-2)
stages = st.integers(1, 8)


@st.composite
def tables(draw: st.DrawFn) -> StepTimes:
    """Any table, noisy ones and those with times that fall too."""
    rows = tuple(sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=8))))
    columns = [tuple(draw(st.lists(seconds, min_size=len(rows), max_size=len(rows)))) for _ in range(2)]
    return StepTimes(draw(stages), rows, columns[0], columns[1])


def interpolated(at: int, rows: tuple[int, ...], values: tuple[float, ...]) -> float:
    if at <= rows[0]:
        return values[0]
    for (low, a), (high, b) in zip(
        zip(rows[:-1], values[:-1], strict=True), zip(rows[1:], values[1:], strict=True), strict=True
    ):
        if at <= high:
            return a + (b - a) * (at - low) / (high - low)
    return values[-1]


def round_seconds(num_seqs: int, count: int, times: StepTimes) -> float:
    rows = (num_seqs + count - 1) // count
    stage = interpolated(rows, times.rows, times.stage_seconds)
    latency = interpolated(rows, times.rows, times.latency_seconds)
    return max(count * stage, count * PLANNING_SECONDS, latency + PLANNING_SECONDS)


@settings(derandomize=True, deadline=None)
@given(tables(), st.integers(1, 12), st.integers(0, 600))
def test_no_number_is_faster(times: StepTimes, most: int, num_seqs: int) -> None:
    chosen = choose(num_seqs, most, times)
    assert min(times.num_stages, most) <= chosen <= most
    best = round_seconds(num_seqs, chosen, times)
    for count in range(min(times.num_stages, most), most + 1):
        other = round_seconds(num_seqs, count, times)
        assert best <= other * (1 + 1e-9)
        if count < chosen:
            assert other > best * (1 - 1e-9), "of equal ones the smallest"


@settings(derandomize=True, deadline=None)
@given(stages, st.floats(2 * PLANNING_SECONDS, 1e-2), st.floats(0, 1e-4), st.floats(0, 1e-2), st.integers(1, 600))
def test_fewer_than_stages_would_not_be_faster(
    num_stages: int, weights: float, per_seq: float, way: float, num_seqs: int
) -> None:
    """For stages of equal length, so that leaving these numbers out loses nothing."""
    times = line(num_stages, weights, per_seq, way)
    at_stages = round_seconds(num_seqs, num_stages, times)
    assert all(round_seconds(num_seqs, count, times) >= at_stages * (1 - 1e-9) for count in range(1, num_stages))


@settings(derandomize=True, deadline=None)
@given(stages, st.floats(2 * PLANNING_SECONDS, 1e-2), st.floats(0, 1e-4), st.floats(0, 1e-2), st.floats(1, 10))
def test_longer_way_never_has_fewer(num_stages: int, weights: float, per_seq: float, way: float, factor: float) -> None:
    near, far = (line(num_stages, weights, per_seq, length) for length in (way, factor * way))
    assert choose(128, num_stages + 1, near) <= choose(128, num_stages + 1, far)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ((), ((), ()), "do not ascend"),
        ((8, 4), ((1.0, 1.0), (1.0, 1.0)), "do not ascend"),
        ((4, 4), ((1.0, 1.0), (1.0, 1.0)), "do not ascend"),
        ((4, 8), ((1.0,), (1.0, 1.0)), "2 rows have 1 stage times"),
    ],
)
def test_broken_table_is_refused(
    rows: tuple[int, ...], columns: tuple[tuple[float, ...], tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepTimes(2, rows, *columns)


WEIGHTS_DOMINATE = line(2, weights=5e-3, per_seq=1e-5, way=3e-4)
WAY_DOMINATES = line(2, weights=5e-4, per_seq=1e-5, way=1e-3)


class Pipe:
    """Fills itself as the engine does, with as many steps in flight as the executor takes."""

    def __init__(self, times: StepTimes | None, num_seqs: int, depth: int = 3, **limits: int) -> None:
        self.scheduler: Scheduler = make_scheduler(
            num_microbatches=depth, step_times=times, max_num_seqs=num_seqs, max_queued_requests=num_seqs,
            num_blocks=16 * num_seqs, **limits,
        )  # fmt: skip
        self.depth = depth
        self.in_flight: deque[StepPlan] = deque()
        for index in range(num_seqs):
            self.scheduler.submit(make_request(f"r{index}", make_prompt(3, 10 + index), max_tokens=60), 0.0)

    def step(self) -> StepPlan:
        while len(self.in_flight) < self.depth and (plan := self.scheduler.plan(0.0)) is not None:
            self.in_flight.append(plan)
        self.sizes = [plan.num_seqs for plan in self.in_flight]
        plan = self.in_flight.popleft()
        self.scheduler.apply(make_result(plan), 0.0)
        return plan


@pytest.mark.parametrize(
    ("times", "expected"),
    [(WEIGHTS_DOMINATE, [6, 6]), (WAY_DOMINATES, [4, 4, 4]), (None, [4, 4, 4])],
    ids=["weights dominate", "way dominates", "not measured"],
)
def test_scheduler_keeps_the_chosen_number_in_flight(times: StepTimes | None, expected: list[int]) -> None:
    pipe = Pipe(times, num_seqs=12)
    for _ in range(6):
        pipe.step()
    for _ in range(9):
        pipe.step()
        assert pipe.sizes == expected


def test_sequences_that_started_in_smaller_groups_come_together() -> None:
    """A token budget that admits three prompts at a time starts three groups; times that want two get two."""
    pipe = Pipe(WEIGHTS_DOMINATE, num_seqs=9, max_num_batched_tokens=9)
    pipe.step()
    for _ in range(8):
        pipe.step()
    for _ in range(6):
        pipe.step()
        assert sorted(pipe.sizes) == [4, 5]


@pytest.mark.parametrize("times", [WEIGHTS_DOMINATE, WAY_DOMINATES], ids=["weights dominate", "way dominates"])
def test_every_sequence_gets_its_turn(times: StepTimes) -> None:
    pipe = Pipe(times, num_seqs=11)
    for _ in range(6):
        pipe.step()
    turns = np.zeros(11, int)
    for _ in range(30):
        turns[pipe.step().seq_indices] += 1
    assert turns.max() - turns.min() <= 1
    assert turns.min() >= 10


def test_long_prompt_may_still_fill_the_pipe_beside_decodes() -> None:
    pipe = Pipe(WEIGHTS_DOMINATE, num_seqs=2, max_num_batched_tokens=8)
    for _ in range(4):
        pipe.step()
    pipe.scheduler.cancel("r1", 0.0)
    pipe.step()
    pipe.scheduler.submit(make_request("long", make_prompt(40, 60)), 0.0)
    pipe.step()
    pipe.step()
    assert len(pipe.sizes) == 3


def simulated_round(times: StepTimes, depth: int, num_seqs: int, chosen_by_times: bool) -> float:
    """Seconds per token of each sequence: a host that plans, stages that compute in turn, and the way between them."""
    pipe = Pipe(times if chosen_by_times else None, num_seqs, depth)
    way = float(times.latency_seconds[0] - times.num_stages * times.stage_seconds[0])
    now, num_tokens, free, results, began = 0.0, 0, [0.0] * times.num_stages, deque[float](), 0.0
    for index in range(40 * depth):
        while len(pipe.in_flight) < depth and (plan := pipe.scheduler.plan(0.0)) is not None:
            pipe.in_flight.append(plan)
            now += PLANNING_SECONDS
            done = now + way
            for stage in range(times.num_stages):
                done = free[stage] = max(done, free[stage]) + float(times.stage(np.array(plan.num_seqs)))
            results.append(done)
        now = max(now, results.popleft())
        if index == 20 * depth:
            began, num_tokens = now, 0
        num_tokens += pipe.in_flight[0].num_seqs
        pipe.scheduler.apply(make_result(pipe.in_flight.popleft()), 0.0)
    return (now - began) / num_tokens * num_seqs


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("weights", [3e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("way", [1e-4, 1e-3])
def test_simulated_pipe_is_as_fast_as_the_better_fixed_number(num_stages: int, weights: float, way: float) -> None:
    times = line(num_stages, weights, per_seq=5e-5, way=way)
    chosen = simulated_round(times, num_stages + 1, 60, chosen_by_times=True)
    fixed = [simulated_round(times, depth, 60, chosen_by_times=False) for depth in (num_stages, num_stages + 1)]
    assert chosen <= 1.02 * min(fixed)


def test_number_for_reports_is_the_one_that_is_used() -> None:
    assert make_scheduler(num_microbatches=3, step_times=WEIGHTS_DOMINATE).num_microbatches(8) == 2
    assert make_scheduler(num_microbatches=3, step_times=WAY_DOMINATES).num_microbatches(8) == 3
    assert make_scheduler(num_microbatches=3).num_microbatches(8) == 3
