"""Paged blocks: sharing by prefix, reference counts, which blocks go first, and where new ones are placed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.runtime.kv_cache import BlockPlanner

BLOCK_SIZE = 4


def planner(num_blocks: int = 16, **options: object) -> BlockPlanner:
    return BlockPlanner(num_blocks, BLOCK_SIZE, 8, 64, **options)  # type: ignore[arg-type]


def prompt(*token_ids: int) -> NDArray[np.int32]:
    return np.array(token_ids, np.int32)


def keys_of(blocks: BlockPlanner, token_ids: NDArray[np.int32], salt: bytes = b"") -> list[bytes]:
    keys: list[bytes] = []
    blocks.extend_keys(keys, token_ids, salt)
    return keys


def fill(blocks: BlockPlanner, seq_index: int, token_ids: NDArray[np.int32]) -> int:
    """Admit a sequence and mark its full blocks as computed; returns the tokens found in the cache."""
    keys = keys_of(blocks, token_ids)
    num_cached = blocks.admit(seq_index, len(token_ids), len(token_ids), keys, 0)
    assert num_cached is not None
    blocks.mark_filled(seq_index, keys)
    return num_cached


def test_a_key_stands_for_the_whole_prefix() -> None:
    blocks = planner()
    one = keys_of(blocks, prompt(1, 2, 3, 4, 5, 6, 7, 8))
    same_second_block = keys_of(blocks, prompt(9, 2, 3, 4, 5, 6, 7, 8))
    assert len(one) == len(same_second_block) == 2
    assert set(one).isdisjoint(same_second_block)
    assert keys_of(blocks, prompt(1, 2, 3, 4, 5)) == one[:1], "only full blocks have keys"


def test_keys_grow_with_the_tokens() -> None:
    blocks = planner()
    keys = keys_of(blocks, prompt(1, 2, 3, 4, 5))
    blocks.extend_keys(keys, prompt(1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert keys == keys_of(blocks, prompt(1, 2, 3, 4, 5, 6, 7, 8))


def test_another_salt_shares_nothing() -> None:
    blocks, tokens = planner(), prompt(1, 2, 3, 4, 5, 6, 7, 8)
    one, other = keys_of(blocks, tokens, b"a"), keys_of(blocks, tokens, b"b")
    assert set(one).isdisjoint(other)
    assert set(one).isdisjoint(keys_of(blocks, tokens))
    grown = keys_of(blocks, tokens[:4], b"a")
    blocks.extend_keys(grown, tokens, b"a")
    assert grown == one


def test_common_prefix_is_held_once() -> None:
    blocks = planner()
    assert fill(blocks, 0, prompt(1, 2, 3, 4, 5, 6, 7, 8, 9)) == 0
    assert fill(blocks, 1, prompt(1, 2, 3, 4, 5, 6, 7, 8, 10, 11)) == 8
    assert blocks.block_table(1)[:2].tolist() == blocks.block_table(0)[:2].tolist()
    assert blocks.block_table(1)[2] != blocks.block_table(0)[2]
    assert blocks.num_free_blocks == 16 - 4
    blocks.release(0, [])
    assert blocks.num_free_blocks == 16 - 3, "the other sequence still holds the prefix"
    blocks.release(1, [])
    assert blocks.num_free_blocks == 16


def test_last_token_is_left_to_compute_when_the_whole_prompt_is_known() -> None:
    blocks = planner()
    tokens = prompt(1, 2, 3, 4, 5, 6, 7, 8)
    fill(blocks, 0, tokens)
    assert fill(blocks, 1, tokens) == 4
    assert blocks.block_table(1)[1] != blocks.block_table(0)[1]


def test_unmarked_blocks_are_not_found() -> None:
    blocks = planner()
    tokens = prompt(1, 2, 3, 4, 5)
    keys = keys_of(blocks, tokens)
    assert blocks.admit(0, 5, 5, keys, 0) == 0
    assert blocks.admit(1, 5, 5, keys, 0) == 0


def test_prefix_outlives_its_sequence_until_the_space_is_needed() -> None:
    blocks = planner(num_blocks=4)
    tokens = prompt(1, 2, 3, 4, 5)
    fill(blocks, 0, tokens)
    blocks.release(0, [])
    assert fill(blocks, 1, tokens) == 4
    blocks.release(1, [])
    fill(blocks, 2, np.arange(50, 66, dtype=np.int32))
    blocks.release(2, [])
    assert fill(blocks, 3, tokens) == 0


def test_free_blocks_go_before_kept_ones_and_old_before_recent() -> None:
    blocks = planner(num_blocks=4)
    old, recent = prompt(1, 1, 1, 1, 1), prompt(2, 2, 2, 2, 2)
    for seq_index, tokens in enumerate((old, recent)):
        fill(blocks, seq_index, tokens)
    for seq_index in (0, 1):
        blocks.release(seq_index, [])
    fill(blocks, 2, prompt(7, 7, 7, 7, 7, 7, 7, 7, 7))  # two free blocks and the older prefix
    assert blocks.admit(3, 5, 5, keys_of(blocks, old), 0) is None
    blocks.discard(2)
    assert fill(blocks, 3, recent) == 4
    assert fill(blocks, 4, old) == 0


def test_end_of_a_prefix_is_evicted_before_its_start() -> None:
    blocks = planner(num_blocks=3)
    tokens = np.arange(1, 10, dtype=np.int32)
    fill(blocks, 0, tokens)
    blocks.release(0, [])
    fill(blocks, 1, prompt(50, 51, 52, 53, 54))  # the free block and one of the two kept ones
    blocks.discard(1)
    assert fill(blocks, 2, tokens) == 4


def test_discarded_blocks_are_never_shared_again() -> None:
    blocks = planner()
    tokens = prompt(1, 2, 3, 4, 5)
    fill(blocks, 0, tokens)
    fill(blocks, 1, tokens)
    blocks.discard(0)
    assert fill(blocks, 2, tokens) == 0
    blocks.release(1, [])
    blocks.release(2, [])
    assert blocks.num_free_blocks == 16
    assert fill(blocks, 3, tokens) == 4, "what seq_index 2 computed anew is shared"


def test_admission_leaves_the_spare_blocks() -> None:
    blocks = planner(num_blocks=4)
    assert blocks.admit(0, 9, 9, [], spare_blocks=2) is None
    assert blocks.num_free_blocks == 4
    assert blocks.admit(0, 9, 9, [], spare_blocks=1) == 0


def test_admission_counts_the_kept_blocks_that_it_shares() -> None:
    blocks = planner(num_blocks=3)
    tokens = np.arange(1, 10, dtype=np.int32)
    fill(blocks, 0, tokens)
    blocks.release(0, [])
    assert blocks.admit(1, 9, 9, keys_of(blocks, tokens), spare_blocks=1) is None
    assert blocks.admit(1, 9, 9, keys_of(blocks, tokens), spare_blocks=0) == 8


def test_sharing_switched_off_finds_nothing() -> None:
    blocks = planner(share_prefixes=False)
    tokens = prompt(1, 2, 3, 4, 5)
    assert fill(blocks, 0, tokens) == fill(blocks, 1, tokens) == 0


def test_extend_gives_a_block_where_one_starts() -> None:
    blocks = planner()
    for seq_index, length in enumerate((4, 5, 8)):
        assert blocks.admit(seq_index, length, 64, [], 0) == 0
    blocks.take_new_blocks()
    assert blocks.extend(np.array([0, 1, 2]), np.array([4, 5, 8], np.int32))
    changes = blocks.take_new_blocks()
    assert changes[:, :3].tolist() == [[0, 0, 1], [0, 2, 2]]
    assert blocks.block_table(0).tolist()[1] == changes[0, 3]


def test_extend_changes_nothing_when_blocks_are_short() -> None:
    blocks = planner(num_blocks=3)
    assert blocks.admit(0, 4, 4, [], 0) == blocks.admit(1, 4, 4, [], 0) == 0
    blocks.take_new_blocks()
    assert not blocks.extend(np.array([0, 1]), np.array([4, 4], np.int32))
    assert blocks.num_free_blocks == 1
    assert len(blocks.take_new_blocks()) == 0


def test_sequences_that_grow_side_by_side_keep_consecutive_blocks() -> None:
    blocks = planner(num_blocks=64)
    seq_indices = np.arange(4)
    for seq_index in seq_indices.tolist():
        assert blocks.admit(seq_index, 6, 40, [], 0) == 0
    for position in range(6, 40):
        assert blocks.extend(seq_indices, np.full(4, position, np.int32))
    for seq_index in seq_indices.tolist():
        assert np.diff(blocks.block_table(seq_index)).tolist() == [1] * 9


def test_prompt_takes_a_consecutive_run_past_smaller_holes() -> None:
    blocks = planner(num_blocks=16)
    for seq_index in range(3):
        assert blocks.admit(seq_index, 8, 8, [], 0) == 0
    blocks.release(1, [])
    assert blocks.admit(3, 16, 16, [], 0) == 0
    assert np.diff(blocks.block_table(3)).tolist() == [1, 1, 1]


def test_every_block_can_be_used_when_none_are_consecutive() -> None:
    blocks = planner(num_blocks=8)
    for seq_index in range(8):
        assert blocks.admit(seq_index, 4, 4, [], 0) == 0
    for seq_index in range(0, 8, 2):
        blocks.release(seq_index, [])
    assert blocks.admit(0, 16, 16, [], 0) == 0
    assert len(set(blocks.block_table(0).tolist())) == 4
    assert blocks.num_free_blocks == 0


def test_a_fork_shares_full_blocks_and_copies_the_one_that_is_partly_filled() -> None:
    blocks = planner()
    assert blocks.admit(0, 11, 20, [], 0) == 0
    blocks.take_new_blocks()
    assert blocks.fork(1, 0, 10, 11, 20, 0) == 10
    parent, child = blocks.block_table(0).tolist(), blocks.block_table(1).tolist()
    assert child[:2] == parent[:2]
    assert child[2] not in parent
    assert blocks.take_copies().tolist() == [[0, parent[2], child[2]]]
    assert blocks.take_copies().shape == (0, 3), "each copy is told once"
    assert blocks.take_new_blocks().tolist() == [[0, 1, index, block] for index, block in enumerate(child)]
    assert blocks.num_free_blocks == 16 - 4


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    blocks = planner()
    assert blocks.admit(0, 9, 20, [], 0) == 0
    assert blocks.fork(1, 0, 8, 9, 20, 0) == 8
    assert len(blocks.take_copies()) == 0


def test_a_fork_that_does_not_fit_changes_nothing() -> None:
    blocks = planner(num_blocks=4)
    assert blocks.admit(0, 11, 20, [], 0) == 0
    assert blocks.fork(1, 0, 10, 11, 20, spare_blocks=1) is None
    assert (blocks.num_free_blocks, len(blocks.block_table(1)), len(blocks.take_copies())) == (1, 0, 0)


def test_source_of_a_copy_outlives_its_sequence_until_the_plan_has_the_copy() -> None:
    blocks = planner(num_blocks=4)
    assert blocks.admit(0, 7, 7, [], 0) == 0
    source = int(blocks.block_table(0)[1])
    assert blocks.fork(1, 0, 6, 7, 7, 0) == 6
    blocks.release(0, [])
    assert blocks.admit(2, 8, 8, [], 0) is None, "one block is free, the source is not"
    ((_, from_block, _),) = blocks.take_copies().tolist()
    assert from_block == source
    assert blocks.admit(2, 8, 8, [], 0) == 0
    for seq_index in (1, 2):
        blocks.release(seq_index, [])
    blocks.check_idle()


def test_a_fork_that_ends_before_its_plan_copies_nothing() -> None:
    blocks = planner()
    assert blocks.admit(0, 7, 7, [], 0) == 0
    assert blocks.fork(1, 0, 6, 7, 7, 0) == blocks.fork(2, 1, 6, 7, 7, 0) == 6
    blocks.release(1, [])
    assert blocks.take_copies().tolist() == [[0, int(blocks.block_table(0)[1]), int(blocks.block_table(2)[1])]]


def test_blocks_held_by_nobody_that_runs_are_an_error() -> None:
    blocks = planner()
    blocks.check_idle()
    assert blocks.admit(0, 7, 7, [], 0) == 0
    with pytest.raises(ExecutorError, match="2 of 16 cache blocks are held though no sequence runs"):
        blocks.check_idle()
    blocks.release(0, [])
    blocks.check_idle()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_an_empty_cache_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="hold nothing"):
        BlockPlanner(num_blocks, block_size, 8, 64)
