"""Plans and results survive packing, and their derived arrays say what they promise."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime.step import ADMISSION, STEP_LAYOUT, TOKEN_BIAS_ENTRY, BatchState, RowKind, StepPlan, StepResult

from ..support.records import admission


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_seqs = draw(st.integers(1, 6))
    num_scheduled_tokens = sorted(
        draw(st.lists(st.integers(1, 5), min_size=num_seqs, max_size=num_seqs)), key=lambda count: count > 1
    )
    starts = draw(st.lists(st.integers(0, 50), min_size=num_seqs, max_size=num_seqs))
    seq_indices = draw(st.permutations(range(8)))[:num_seqs]
    some_rows = st.lists(st.integers(0, sum(num_scheduled_tokens) - 1), unique=True).map(sorted)
    rows = [draw(some_rows) for _ in RowKind]
    kinds = [kind for kind in RowKind for _ in rows[kind]]
    num_blocks, num_copies = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    admissions = np.zeros(draw(st.integers(0, 2)), ADMISSION)
    admissions["seed"], admissions["seq_index"] = draw(st.integers(0, 2**64 - 1)), np.arange(len(admissions))
    admissions["num_logprobs"] = draw(st.integers(-1, 3))
    biases = np.zeros(draw(st.integers(0, 3)), TOKEN_BIAS_ENTRY)
    biases["bias"] = (7, draw(st.floats(-100, 100, width=32)), 9, 1)
    new_blocks = np.arange(4 * num_blocks, dtype=np.int32).reshape(-1, 4) % 8
    new_blocks[:, 0] = 0
    return StepPlan.pack(
        draw(st.integers(0, 2**31 - 1)), int32(*seq_indices), int32(*starts), int32(*num_scheduled_tokens),
        np.arange(sum(num_scheduled_tokens), dtype=np.int32), int32(*itertools.chain(*rows)), int32(*kinds), int32(*kinds),
        new_blocks=new_blocks, copies=np.arange(3 * num_copies, dtype=np.int32).reshape(-1, 3), admissions=admissions,
        biases=biases, pass_id=draw(st.integers(0, 2)), num_alternatives=draw(st.integers(0, 20)),
    )  # fmt: skip


@given(plan=plans())
def test_plan_is_its_packed_words(plan: StepPlan) -> None:
    copy = StepPlan.unpack(plan.words.copy())
    for field in dataclasses.fields(StepPlan):
        np.testing.assert_array_equal(getattr(copy, field.name), getattr(plan, field.name))
    copy.token_ids[:] += 1
    again = StepPlan.unpack(copy.words)
    assert again.token_ids.tolist() == [token + 1 for token in plan.token_ids.tolist()], "arrays are views"


def test_layout_says_where_everything_lies() -> None:
    """The constants that kernels are compiled with lead to the same numbers."""
    plan = StepPlan.pack(
        9, int32(3, 5), int32(0, 2), int32(1, 2), int32(7, 8, 9), int32(0, 2), copies=int32(0, 4, 6).reshape(1, 3)
    )
    at, words = STEP_LAYOUT.defines, plan.words.tolist()
    assert words[at["AT_STEP_ID"]] == 9
    assert words[at["AT_NUM_DECODES"]] == 1
    assert (words[at["AT_NUM_SEQS"]], words[at["AT_NUM_TOKENS"]], words[at["AT_NUM_COPIES"]]) == (2, 3, 1)
    start = words[at["AT_TOKEN_IDS_AT"]]
    assert words[start : start + 3] == [7, 8, 9]
    start = words[at["AT_COPIES_AT"]]
    assert words[start : start + at["COPIES_WORDS"]] == [0, 4, 6]
    sizes = {
        "num_seqs": 2,
        "num_tokens": 3,
        "num_rows": 2,
        "num_new_blocks": 0,
        "num_copies": 1,
        "num_admissions": 0,
        "num_biases": 0,
        "num_masks": 0,
        "num_mask_words": 0,
    }
    assert len(words) == STEP_LAYOUT.most_words(**sizes)


def test_a_section_of_another_length_than_its_siblings_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="equally many"):
        StepPlan.pack(0, int32(3, 5), int32(0), int32(1, 1), int32(7, 8), int32(0))


@given(plan=plans())
def test_rows_follow_sequences(plan: StepPlan) -> None:
    positions, rows = plan.positions.tolist(), []
    for start, count in zip(plan.starts.tolist(), plan.num_scheduled_tokens.tolist(), strict=True):
        rows += range(start, start + count)
    assert positions == rows
    assert plan.num_decodes == plan.num_scheduled_tokens.tolist().count(1)
    owners = np.repeat(np.arange(plan.num_seqs), plan.num_scheduled_tokens)
    sampled = plan.rows[: plan.num_sampled]
    assert plan.sampling_seqs.tolist() == owners[sampled].tolist()
    assert plan.sampled_positions.tolist() == (plan.positions[sampled] + 1).tolist()
    assert plan.num_logit_rows == plan.num_sampled + plan.kinds.tolist().count(RowKind.SCORE)


@given(plan=plans(), count=st.integers(0, 5))
def test_result_survives_packing_and_has_the_announced_size(plan: StepPlan, count: int) -> None:
    state = BatchState.empty(8, 16)
    state.sampling["num_logprobs"] = -1
    state.apply(plan)
    rows, most = state.logprob_shape(plan)
    num_hidden, hidden_size = len(plan.rows) - plan.num_logit_rows, 3
    result = StepResult(
        plan.step_id, np.arange(plan.num_logit_rows, dtype=np.int32), np.arange(rows, dtype=np.float32),
        np.arange(rows * most, dtype=np.int32).reshape(rows, most), np.ones((rows, most), np.float32),
        np.ones((num_hidden, hidden_size), np.float32),
    )  # fmt: skip
    packed = result.pack()
    assert len(packed) == StepResult.num_words(plan, state, hidden_size)
    copy = StepResult.unpack(packed)
    for field in dataclasses.fields(StepResult):
        np.testing.assert_array_equal(getattr(copy, field.name), getattr(result, field.name))


def test_state_takes_over_blocks_and_parameters() -> None:
    state = BatchState.empty(4, 4)
    admissions = admission(seq_index=3, temperature=0.5, top_k=7, repetition_penalty=1.5, num_prompt=9, seed=2**63 + 1)
    state.apply(
        StepPlan.pack(
            0, int32(3), int32(0), int32(1), int32(9), int32(0),
            new_blocks=int32(0, 3, 1, 42).reshape(1, 4), admissions=admissions,
        )
    )  # fmt: skip
    assert state.block_tables[0, 3, 1] == 42
    assert state.sampling[3] == admissions[0]


def test_another_cache_group_than_the_state_has_is_refused() -> None:
    plan = StepPlan.pack(
        0, int32(3), int32(0), int32(1), int32(9), int32(0), new_blocks=int32(1, 3, 1, 42).reshape(1, 4)
    )
    with pytest.raises(IndexError):
        BatchState.empty(4, 4).apply(plan)
    state = BatchState.empty(4, 4, num_groups=2)
    state.apply(plan)
    assert state.block_tables[:, 3, 1].tolist() == [0, 42]
