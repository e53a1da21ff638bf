"""Plans and results survive packing, and their derived arrays say what they promise."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime.step import ADMISSION, BatchState, StepPlan, StepResult


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_seqs = draw(st.integers(1, 6))
    num_scheduled_tokens = sorted(
        draw(st.lists(st.integers(1, 5), min_size=num_seqs, max_size=num_seqs)), key=lambda count: count > 1
    )
    starts = draw(st.lists(st.integers(0, 50), min_size=num_seqs, max_size=num_seqs))
    samples = draw(st.lists(st.integers(0, 1), min_size=num_seqs, max_size=num_seqs))
    seq_indices = draw(st.permutations(range(8)))[:num_seqs]
    num_blocks, num_prompt = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    admissions = np.zeros(draw(st.integers(0, 2)), ADMISSION)
    admissions["seed"], admissions["seq_index"] = draw(st.integers(0, 2**64 - 1)), np.arange(len(admissions))
    admissions["num_logprobs"] = draw(st.integers(-1, 3))
    return StepPlan(
        draw(st.integers(0, 2**31 - 1)), int32(*seq_indices), int32(*starts), int32(*num_scheduled_tokens), int32(*samples),
        np.arange(sum(num_scheduled_tokens), dtype=np.int32), np.arange(3 * num_blocks, dtype=np.int32).reshape(-1, 3) % 8,
        admissions, np.arange(num_prompt, dtype=np.int32), np.arange(num_prompt, dtype=np.int32), draw(st.integers(0, 20)),
    )  # fmt: skip


@given(plan=plans())
def test_plan_survives_packing(plan: StepPlan) -> None:
    copy = StepPlan.unpack(plan.pack())
    for field in dataclasses.fields(StepPlan):
        np.testing.assert_array_equal(getattr(copy, field.name), getattr(plan, field.name))


@given(plan=plans())
def test_rows_follow_sequences(plan: StepPlan) -> None:
    positions, rows = plan.positions.tolist(), []
    for start, count in zip(plan.starts.tolist(), plan.num_scheduled_tokens.tolist(), strict=True):
        rows += range(start, start + count)
    assert positions == rows
    assert plan.num_decodes == plan.num_scheduled_tokens.tolist().count(1)
    ends = np.cumsum(plan.num_scheduled_tokens) - 1
    assert plan.sample_rows.tolist() == [end for end, sample in zip(ends, plan.samples, strict=True) if sample]


@given(plan=plans(), count=st.integers(0, 5))
def test_result_survives_packing_and_has_the_announced_size(plan: StepPlan, count: int) -> None:
    state = BatchState.empty(8, 16)
    state.sampling["num_logprobs"] = -1
    state.apply(plan)
    rows, most = plan.logprob_shape(state)
    tokens = int(plan.samples.sum())
    result = StepResult(
        plan.step_id, np.arange(tokens, dtype=np.int32), np.arange(rows, dtype=np.float32),
        np.arange(rows * most, dtype=np.int32).reshape(rows, most), np.ones((rows, most), np.float32),
    )  # fmt: skip
    packed = result.pack()
    assert len(packed) == plan.result_words(state)
    copy = StepResult.unpack(packed)
    for field in dataclasses.fields(StepResult):
        np.testing.assert_array_equal(getattr(copy, field.name), getattr(result, field.name))


def test_state_takes_over_blocks_and_parameters() -> None:
    state = BatchState.empty(4, 4)
    admissions = np.array([(3, 0.5, 7, 0.9, 0.1, 2, 2**63 + 1)], ADMISSION)
    state.apply(
        StepPlan(0, int32(3), int32(0), int32(1), int32(1), int32(9), int32(3, 1, 42).reshape(1, 3), admissions)
    )
    assert state.block_tables[3, 1] == 42
    assert state.sampling[3] == admissions[0]
