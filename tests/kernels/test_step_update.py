import numpy as np
import pytest

from phalanx.kernels.step_update import StepArrays, StepKernels
from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.step import ADMISSION, PENDING_TOKEN, STEP_LAYOUT, TOKEN_BIAS_ENTRY, BatchState, RowKind, StepPlan

BLOCK_SIZE, SEQS, BLOCKS_PER_SEQ, TOKENS = 4, 9, 6, 40
MAX_BIASES = 3
BLOCKS = 5000


def step_kernels(device, max_num_seqs=SEQS, max_num_tokens=TOKENS, max_blocks_per_seq=BLOCKS_PER_SEQ) -> StepKernels:
    rows = max_num_seqs + max_num_tokens
    arrays = StepArrays.allocate(
        lambda name, shape, dtype: device.put(np.zeros(shape, dtype)),
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens,
        max_logit_rows=rows,
        max_blocks_per_seq=max_blocks_per_seq,
        max_plan_words=STEP_LAYOUT.most_words(
            num_seqs=max_num_seqs, num_tokens=max_num_tokens, num_rows=rows, num_new_blocks=rows,
            num_copies=max_num_seqs, num_admissions=max_num_seqs, num_biases=max_num_seqs * MAX_BIASES,
            num_masks=max_num_seqs, num_mask_words=100,
        ),
        admission_words=ADMISSION.itemsize // 4, max_biases=MAX_BIASES, block_size=BLOCK_SIZE,
    )  # fmt: skip
    arrays.hold_tokens(device.put(np.zeros((BLOCKS, BLOCK_SIZE), np.int32)))
    return StepKernels(device.library, arrays, BLOCK_SIZE, STEP_LAYOUT.defines)


def admission(seq_index: int, **values: float) -> tuple[object, ...]:
    row = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_logprobs": -1,
        "num_prompt": 1,
        "num_prefix": 0,
        "num_biases": 0,
        "seed": 0,
        **values,
    }
    return (seq_index, *row.values())


def mixed_plan() -> StepPlan:
    """Three sequences with one token, then chunks of 7 and 5; the last is a chunk of a longer prompt."""
    blocks = [[4, 2, 17], [0, 0, 5], [7, 0, 6], [2, 0, 1], [2, 1, 2], [2, 2, 3], [8, 0, 9], [8, 1, 8]]
    return StepPlan.pack(
        step_id=3,
        seq_indices=np.array([4, 0, 7, 2, 8], np.int32),
        starts=np.array([9, 0, 3, 2, 0], np.int32),
        num_scheduled_tokens=np.array([1, 1, 1, 7, 5], np.int32),
        token_ids=np.array([PENDING_TOKEN, 11, 12, *range(20, 27), *range(30, 35)], np.int32),
        rows=np.array([0, 1, 7, 9, 3, 4], np.int32),
        kinds=np.array([RowKind.SAMPLE] * 4 + [RowKind.SCORE] * 2, np.int32),
        targets=np.array([-1, -1, -1, -1, 21, 22], np.int32),
        new_blocks=np.array([[0, *block] for block in blocks], np.int32),
        admissions=np.array(
            [
                admission(2, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, num_prefix=4, seed=2**63 + 5),
                admission(4, temperature=2.0),
            ],
            ADMISSION,
        ),
    )


def load(device, step: StepKernels, plan: StepPlan) -> StepArrays:
    step.arrays.plan[: len(plan.words)] = device.put(plan.words)
    step.arrays.last_tokens[...] = device.put(100 + np.arange(len(step.arrays.last_tokens), dtype=np.int32))
    return step.arrays


@pytest.mark.parametrize(("num_rows", "num_logit_rows"), [(15, 6), (40, 12)])
def test_step_arrays_equal_the_plans_own_properties(device, num_rows, num_logit_rows):
    plan, state, step = mixed_plan(), BatchState.empty(SEQS, BLOCKS_PER_SEQ), step_kernels(device)
    arrays = load(device, step, plan)
    state.apply(plan)
    step.update(num_rows, num_logit_rows)
    total, rows = plan.num_tokens, len(plan.rows)
    np.testing.assert_array_equal(device.get(arrays.block_tables), state.block_tables[0])
    np.testing.assert_array_equal(device.get(arrays.cu_seqlens)[: plan.num_seqs + 1], plan.cu_seqlens)
    np.testing.assert_array_equal(device.get(arrays.seq_lens)[: plan.num_seqs], plan.starts + plan.num_scheduled_tokens)
    np.testing.assert_array_equal(device.get(arrays.seq_indices)[: plan.num_seqs], plan.seq_indices)
    np.testing.assert_array_equal(device.get(arrays.num_seqs_and_decodes), [plan.num_seqs, plan.num_decodes])
    np.testing.assert_array_equal(device.get(arrays.positions)[:num_rows], [*plan.positions, *[0] * (num_rows - total)])
    row_seq_indices = np.repeat(plan.seq_indices, plan.num_scheduled_tokens)
    blocks = state.block_tables[0, row_seq_indices, plan.positions // BLOCK_SIZE]
    expected = blocks * BLOCK_SIZE + plan.positions % BLOCK_SIZE
    np.testing.assert_array_equal(device.get(arrays.slot_mapping)[:num_rows], [*expected, *[-1] * (num_rows - total)])
    prefix_lens = state.sampling["num_prefix"][row_seq_indices]
    assert set(prefix_lens) == {0, 4}
    np.testing.assert_array_equal(device.get(arrays.prefix_lens)[:num_rows], [*prefix_lens, *[0] * (num_rows - total)])
    tokens = device.get(arrays.token_ids)[:num_rows]
    np.testing.assert_array_equal(tokens, [104, *plan.token_ids[1:], *[0] * (num_rows - total)])
    cached = np.zeros(BLOCKS * BLOCK_SIZE, np.int32)
    cached[expected] = tokens[:total]
    np.testing.assert_array_equal(device.get(arrays.cached_tokens).reshape(-1), cached)
    padding = [-1] * (num_logit_rows - rows)
    np.testing.assert_array_equal(device.get(arrays.logit_rows)[:num_logit_rows], [*plan.rows, *padding])
    np.testing.assert_array_equal(device.get(arrays.row_targets)[:num_logit_rows], [*plan.targets, *padding])
    sampled = device.get(arrays.row_positions)[: plan.num_sampled]
    np.testing.assert_array_equal(sampled, plan.sampled_positions)


def test_rows_carry_their_sequences_sampling_parameters(device):
    plan, step = mixed_plan(), step_kernels(device)
    arrays = load(device, step, plan)
    step.update(TOKENS, 7)
    np.testing.assert_array_equal(device.get(arrays.row_seq_indices)[:7], [4, 0, 2, 2, -1, -1, -1])
    np.testing.assert_array_equal(device.get(arrays.row_positions)[:7], [10, 1, 7, 9, 0, 0, 0])
    records = np.ascontiguousarray(device.get(arrays.row_sampling)[:7]).view(ADMISSION)[:, 0]
    np.testing.assert_array_equal(records["temperature"], np.float32([2, 0, 0.5, 0.5, 0, 0, 0]))
    np.testing.assert_array_equal(records[[0, 2, 3]], plan.admissions[[1, 0, 0]])
    np.testing.assert_array_equal(records[[1, 4, 5, 6]], np.zeros(4, ADMISSION))


def test_token_biases_of_admitted_sequences_replace_those_of_earlier_ones(device):
    plan, state, step = mixed_plan(), BatchState.empty(SEQS, BLOCKS_PER_SEQ), step_kernels(device)
    for tokens in ((5, 6, 7), (8, 9)):
        entries = [(2, index, (token, -0.5 * token, 10 + token, 0)) for index, token in enumerate(tokens)]
        entries += [(8, 0, (tokens[0], 1.0, 3, 2))]
        plan = StepPlan.pack(
            3, plan.seq_indices, plan.starts, plan.num_scheduled_tokens, plan.token_ids, plan.rows[:4],
            biases=np.array(entries, TOKEN_BIAS_ENTRY),
        )  # fmt: skip
        arrays = load(device, step, plan)
        step.update(TOKENS, 7)
        state.apply(plan)
        expected = state.biases[:, :MAX_BIASES].copy().view(np.int32).reshape(SEQS, MAX_BIASES, 4)
        np.testing.assert_array_equal(device.get(arrays.biases), expected)
    assert state.biases["token"][2, :4].tolist() == [8, 9, 7, 0]


def test_rows_with_masks_say_where_in_the_plan_they_are(device):
    plan, step = mixed_plan(), step_kernels(device)
    masks = np.arange(6, dtype=np.int32).reshape(2, 3)
    plan = StepPlan.pack(
        3, plan.seq_indices, plan.starts, plan.num_scheduled_tokens, plan.token_ids, plan.rows[:4],
        masked_rows=np.array([3, 1], np.int32), masks=masks,
    )  # fmt: skip
    arrays = load(device, step, plan)
    step.update(TOKENS, 7)
    offsets = device.get(arrays.row_masks)[:7]
    assert offsets[[0, 2, 4, 5, 6]].tolist() == [-1] * 5
    for row, mask in ((3, masks[0]), (1, masks[1])):
        assert plan.words[offsets[row] : offsets[row] + 3].tolist() == mask.tolist()
        assert plan.row_masks[row].tolist() == mask.tolist()


def test_last_sampled_tokens_reach_their_sequences_and_scored_rows_get_their_targets(device):
    step = step_kernels(device)
    arrays = load(device, step, mixed_plan())
    step.update(TOKENS, 7)
    sampled = device.put(np.array([50, 51, 52, 53, 54, 55, 56], np.int32))
    step.store_tokens(sampled)
    np.testing.assert_array_equal(device.get(sampled), [50, 51, 52, 53, 21, 22, -1])
    np.testing.assert_array_equal(device.get(arrays.last_tokens), [51, 101, 53, 103, 50, 105, 106, 107, 108])


def test_more_sequences_than_threads_are_scanned_in_turns(device):
    count = 1300
    rng = np.random.default_rng(0)
    num_scheduled_tokens = np.sort(rng.integers(1, 4, count)).astype(np.int32)
    ends = num_scheduled_tokens.cumsum(dtype=np.int32)
    plan = StepPlan.pack(
        0, rng.permutation(count).astype(np.int32), rng.integers(0, 5, count).astype(np.int32), num_scheduled_tokens,
        np.arange(ends[-1], dtype=np.int32), ends[rng.integers(0, 2, count) > 0] - np.int32(1),
    )  # fmt: skip
    step = step_kernels(device, count, 4000, 2)
    arrays = load(device, step, plan)
    step.update(4000, count)
    np.testing.assert_array_equal(device.get(arrays.cu_seqlens), plan.cu_seqlens)
    np.testing.assert_array_equal(device.get(arrays.positions)[: plan.num_tokens], plan.positions)
    np.testing.assert_array_equal(device.get(arrays.logit_rows)[: len(plan.rows)], plan.rows)
    np.testing.assert_array_equal(device.get(arrays.row_positions)[: len(plan.rows)], plan.sampled_positions)
    assert device.get(arrays.num_seqs_and_decodes).tolist() == [count, int((num_scheduled_tokens == 1).sum())]


@pytest.mark.parametrize("block_shape", [(1, 4, 8), (2, 16, 64), (3, 128, 128)])
def test_blocks_are_copied_whole(device, block_shape):
    pages = np.random.default_rng(1).integers(0, 2**16, (9, *block_shape)).astype(np.uint16)
    copies = np.array([[0, 2, 7], [0, 2, 0], [0, 8, 1]], np.int32)
    ones = np.ones(1, np.int32)
    plan, step = StepPlan.pack(0, ones, ones, ones, ones, ones, copies=copies), step_kernels(device)
    load(device, step, plan)
    on_device = device.put(pages)
    step.copy_blocks(on_device, len(copies))
    pages[[7, 0, 1]] = pages[[2, 2, 8]]
    np.testing.assert_array_equal(device.get(on_device), pages)


def test_blocks_that_are_not_made_of_vectors_are_refused(device):
    with pytest.raises(ExecutorError, match="a cache block of 24 bytes"):
        step_kernels(device).copy_blocks(device.put(np.zeros((2, 3, 4), np.uint16)), 1)
