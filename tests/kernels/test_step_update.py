import numpy as np
import pytest

from phalanx.kernels import step_update
from phalanx.kernels.step_update import StepArrays, plan_words
from phalanx.runtime.step import ADMISSION, PENDING_TOKEN, BatchState, StepPlan

BLOCK_SIZE, SLOTS, BLOCKS_PER_SEQ, TOKENS = 4, 9, 6, 40
ADMISSION_WORDS = ADMISSION.itemsize // 4


def step_arrays(device) -> StepArrays:
    return StepArrays.allocate(
        lambda name, shape, dtype: device.put(np.zeros(shape, dtype)),
        max_num_seqs=SLOTS,
        max_num_tokens=TOKENS,
        max_logit_rows=SLOTS + TOKENS,
        max_blocks_per_seq=BLOCKS_PER_SEQ,
        admission_words=ADMISSION_WORDS,
    )


def admission(seq_index: int, **values: float) -> tuple[object, ...]:
    row = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_logprobs": -1, "seed": 0, **values}
    return (seq_index, *row.values())


def mixed_plan() -> StepPlan:
    """Three sequences with one token, then chunks of 7 and 5; the last is a chunk of a longer prompt."""
    return StepPlan(
        step_id=3,
        seq_indices=np.array([4, 0, 7, 2, 8], np.int32),
        starts=np.array([9, 0, 3, 2, 0], np.int32),
        num_scheduled_tokens=np.array([1, 1, 1, 7, 5], np.int32),
        samples=np.array([1, 1, 0, 1, 0], np.int32),
        token_ids=np.array([PENDING_TOKEN, 11, 12, *range(20, 27), *range(30, 35)], np.int32),
        new_blocks=np.array(
            [[4, 2, 17], [0, 0, 5], [7, 0, 6], [2, 0, 1], [2, 1, 2], [2, 2, 3], [8, 0, 9], [8, 1, 8]], np.int32
        ),
        admissions=np.array(
            [
                admission(2, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=2**63 + 5),
                admission(4, temperature=2.0),
            ],
            ADMISSION,
        ),
        prompt_rows=np.array([3, 4], np.int32),
        prompt_targets=np.array([21, 22], np.int32),
    )


def load(device, arrays: StepArrays, plan: StepPlan) -> StepArrays:
    words = np.zeros(plan_words(SLOTS, TOKENS, ADMISSION_WORDS), np.int32)
    words[: len(plan.pack())] = plan.pack()
    import dataclasses

    last_tokens = 100 + np.arange(SLOTS, dtype=np.int32)
    return dataclasses.replace(arrays, plan=device.put(words), last_tokens=device.put(last_tokens))


@pytest.mark.parametrize(("num_rows", "num_logit_rows"), [(15, 5), (40, 12)])
def test_step_arrays_equal_the_plans_own_properties(device, num_rows, num_logit_rows):
    plan, state = mixed_plan(), BatchState.empty(SLOTS, BLOCKS_PER_SEQ)
    arrays = load(device, step_arrays(device), plan)
    state.apply(plan)
    step_update.update(device.library, arrays, BLOCK_SIZE, num_rows, num_logit_rows)
    total, rows = plan.num_tokens, len(plan.logit_rows)
    np.testing.assert_array_equal(device.get(arrays.block_tables), state.block_tables)
    np.testing.assert_array_equal(device.get(arrays.cu_seqlens)[: plan.num_seqs + 1], plan.cu_seqlens)
    np.testing.assert_array_equal(device.get(arrays.seq_lens)[: plan.num_seqs], plan.starts + plan.num_scheduled_tokens)
    np.testing.assert_array_equal(device.get(arrays.seq_indices)[: plan.num_seqs], plan.seq_indices)
    np.testing.assert_array_equal(device.get(arrays.num_seqs_and_decodes), [plan.num_seqs, plan.num_decodes])
    np.testing.assert_array_equal(device.get(arrays.positions)[:num_rows], [*plan.positions, *[0] * (num_rows - total)])
    row_seq_indices = np.repeat(plan.seq_indices, plan.num_scheduled_tokens)
    blocks = state.block_tables[row_seq_indices, plan.positions // BLOCK_SIZE]
    expected = blocks * BLOCK_SIZE + plan.positions % BLOCK_SIZE
    np.testing.assert_array_equal(device.get(arrays.slot_mapping)[:num_rows], [*expected, *[-1] * (num_rows - total)])
    tokens = device.get(arrays.token_ids)[:num_rows]
    np.testing.assert_array_equal(tokens, [104, *plan.token_ids[1:], *[0] * (num_rows - total)])
    padding = num_logit_rows - rows
    np.testing.assert_array_equal(device.get(arrays.logit_rows)[:num_logit_rows], [*plan.logit_rows, *[-1] * padding])
    np.testing.assert_array_equal(
        device.get(arrays.row_targets)[:num_logit_rows], [-1, -1, -1, 21, 22, *[-1] * padding]
    )


def test_rows_carry_their_slots_sampling_parameters(device):
    plan = mixed_plan()
    arrays = load(device, step_arrays(device), plan)
    step_update.update(device.library, arrays, BLOCK_SIZE, TOKENS, 6)
    np.testing.assert_array_equal(device.get(arrays.row_seq_indices)[:6], [4, 0, 2, -1, -1, -1])
    np.testing.assert_array_equal(device.get(arrays.row_positions)[:6], [10, 1, 9, 0, 0, 0])
    records = np.ascontiguousarray(device.get(arrays.row_sampling)[:6]).view(ADMISSION)[:, 0]
    np.testing.assert_array_equal(records["temperature"], np.float32([2, 0, 0.5, 0, 0, 0]))
    np.testing.assert_array_equal(records[[0, 2]], plan.admissions[[1, 0]])
    np.testing.assert_array_equal(records[[1, 3, 4, 5]], np.zeros(4, ADMISSION))


def test_stored_tokens_reach_their_slots_and_prompt_rows_get_their_targets(device):
    plan = mixed_plan()
    arrays = load(device, step_arrays(device), plan)
    step_update.update(device.library, arrays, BLOCK_SIZE, TOKENS, 6)
    sampled = device.put(np.array([50, 51, 52, 53, 54, 55], np.int32))
    step_update.store_tokens(device.library, arrays, BLOCK_SIZE, sampled)
    np.testing.assert_array_equal(device.get(sampled), [50, 51, 52, 21, 22, -1])
    np.testing.assert_array_equal(device.get(arrays.last_tokens), [51, 101, 52, 103, 50, 105, 106, 107, 108])


def test_more_sequences_than_threads_are_scanned_in_turns(device):
    count = 1300
    rng = np.random.default_rng(0)
    num_scheduled_tokens = np.sort(rng.integers(1, 4, count)).astype(np.int32)
    plan = StepPlan(
        0, rng.permutation(count).astype(np.int32), rng.integers(0, 5, count).astype(np.int32), num_scheduled_tokens,
        rng.integers(0, 2, count).astype(np.int32), np.arange(num_scheduled_tokens.sum(), dtype=np.int32),
    )  # fmt: skip
    arrays = StepArrays.allocate(
        lambda name, shape, dtype: device.put(np.zeros(shape, dtype)),
        max_num_seqs=count, max_num_tokens=4000, max_logit_rows=count, max_blocks_per_seq=2,
        admission_words=ADMISSION_WORDS,
    )  # fmt: skip
    words = np.zeros(plan_words(count, 4000, ADMISSION_WORDS), np.int32)
    words[: len(plan.pack())] = plan.pack()
    arrays.plan[...] = device.put(words)
    step_update.update(device.library, arrays, BLOCK_SIZE, 4000, count)
    np.testing.assert_array_equal(device.get(arrays.cu_seqlens), plan.cu_seqlens)
    np.testing.assert_array_equal(device.get(arrays.positions)[: plan.num_tokens], plan.positions)
    np.testing.assert_array_equal(device.get(arrays.logit_rows)[: len(plan.sample_rows)], plan.sample_rows)
    assert device.get(arrays.num_seqs_and_decodes).tolist() == [count, int((num_scheduled_tokens == 1).sum())]
