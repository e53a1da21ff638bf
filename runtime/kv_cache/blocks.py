# SPDX-License-Identifier: Apache-2.0
"""Paged blocks with reference counts; full blocks with the same prefix are shared."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.runtime.kv_cache.planner import Int32Array, SeqIndexArray
from phalanx.runtime.kv_cache.pool import BlockPool

__all__ = ["BlockPlanner"]

_KEY_BYTES = 16


class BlockPlanner:
    """`CachePlanner` over N blocks of P tokens.

    The key of a full block is a 128-bit BLAKE2 digest of its tokens and the key before it, and the first block's of its tokens
    and the sequence's salt, so a key stands for a whole prefix. It is cryptographic because prompts of different users meet
    here: no user may be able to make two prefixes collide.

    Args:
        share_prefixes: False computes every prompt in full, unless a sequence is forked.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        share_prefixes: bool = True,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"{num_blocks} blocks of {block_size} tokens hold nothing; use at least 1 of each")
        self._pool = BlockPool(num_blocks)
        self._block_size = block_size
        blocks_per_seq = min(num_blocks, -(-max_model_len // block_size))
        self._tables = np.zeros((max_num_seqs, blocks_per_seq), np.int32)
        self._num_held = np.zeros(max_num_seqs, np.int32)
        self._num_keyed = [0] * max_num_seqs
        self._share_prefixes = share_prefixes
        self._new_blocks: list[Int32Array] = []
        self._copies: dict[int, int] = {}

    @property
    def block_size(self) -> int:
        """P, tokens per block."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """N, blocks of the cache."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_available

    @property
    def max_num_seqs(self) -> int:
        """Rows of the block table."""
        return len(self._tables)

    @property
    def max_tokens_per_seq(self) -> int:
        """Tokens of one sequence that has the cache to itself."""
        return self._tables.shape[1] * self._block_size

    def block_table(self, seq_index: int) -> Int32Array:
        """Block ids of a sequence in order of position; a view."""
        return self._tables[seq_index, : self._num_held[seq_index]]

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array, salt: bytes = b"") -> None:
        """Append the keys of full blocks of ``token_ids`` that ``keys`` lacks."""
        if not self._share_prefixes:
            return
        tokens = token_ids.tobytes()
        width = self._block_size * token_ids.itemsize
        key = keys[-1] if keys else blake2b(salt, digest_size=_KEY_BYTES).digest()
        for end in range((len(keys) + 1) * width, len(tokens) + 1, width):
            key = blake2b(key + tokens[end - width : end], digest_size=_KEY_BYTES).digest()
            keys.append(key)

    def admit(
        self, seq_index: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        """Share the known blocks of the prefix, take the rest; the last token is always left to compute."""
        assert self._num_held[seq_index] == 0, seq_index
        shared = self._pool.find(keys[: (num_tokens - 1) // self._block_size])
        count = self._blocks_for(num_tokens) - len(shared)
        unheld = len(shared) - self._pool.count_held(shared)
        if count + unheld + spare_blocks > self._pool.num_available:
            return None
        self._pool.share(shared)
        growth = self._blocks_for(expected_tokens) - count - len(shared)
        taken = self._pool.take(count, room=max(growth, 0))
        self._append(seq_index, np.concatenate((np.array(shared, np.int32), taken)))
        self._num_keyed[seq_index] = len(shared)
        return len(shared) * self._block_size

    def fork(
        self, seq_index: int, parent: int, num_shared: int, num_tokens: int, expected_tokens: int, spare_blocks: int
    ) -> int | None:
        """Share the parent's full blocks, copy the one that is partly filled, take the rest."""
        assert self._num_held[seq_index] == 0, seq_index
        assert num_shared < num_tokens, (num_shared, num_tokens)
        num_full, num_partial = divmod(num_shared, self._block_size)
        count = self._blocks_for(num_tokens) - num_full
        if count + spare_blocks > self._pool.num_available:
            return None
        table = self.block_table(parent)
        self._pool.share(table[:num_full].tolist())
        growth = self._blocks_for(expected_tokens) - num_full - count
        taken = self._pool.take(count, room=max(growth, 0))
        if num_partial:
            self._copy(int(table[num_full]), int(taken[0]))
        self._append(seq_index, np.concatenate((table[:num_full], taken)))
        self._num_keyed[seq_index] = min(self._num_keyed[parent], num_full)
        return num_shared

    def extend(self, seq_indices: SeqIndexArray, positions: Int32Array) -> bool:
        """One more block for each sequence whose next position starts one, if there are enough."""
        growing = seq_indices[positions >= self._num_held[seq_indices] * self._block_size]
        if len(growing) > self._pool.num_available:
            return False
        if len(growing):
            index = self._num_held[growing]
            # Distinct: every start takes at least one fresh block, so no two sequences have the same last block.
            blocks = self._pool.take_following(self._tables[growing, index - 1])
            self._tables[growing, index] = blocks
            self._num_held[growing] += 1
            self._new_blocks.append(np.stack((np.zeros_like(index), growing.astype(np.int32), index, blocks), axis=1))
        return True

    def mark_filled(self, seq_index: int, keys: list[bytes]) -> None:
        """Let later admissions share the first ``len(keys)`` blocks."""
        for index in range(self._num_keyed[seq_index], len(keys)):
            self._pool.set_key(int(self._tables[seq_index, index]), keys[index])
        self._num_keyed[seq_index] = max(self._num_keyed[seq_index], len(keys))

    def release(self, seq_index: int, keys: list[bytes]) -> None:
        """Take the blocks back; keyed ones keep their prefix until the space is needed."""
        self.mark_filled(seq_index, keys)
        self._drop(seq_index)

    def discard(self, seq_index: int) -> None:
        """Take the blocks back and forget what they hold, shared ones included."""
        for block in self.block_table(seq_index).tolist():
            self._pool.forget_key(block)
        self._drop(seq_index)

    def take_new_blocks(self) -> Int32Array:
        """Changes of the block tables since the last call."""
        if not self._new_blocks:
            return np.empty((0, 4), np.int32)
        changes = np.concatenate(self._new_blocks)
        self._new_blocks.clear()
        return changes

    def take_copies(self) -> Int32Array:
        """Copies of partly filled blocks since the last call; their sources may be used for something else from now on."""
        if not self._copies:
            return np.empty((0, 3), np.int32)
        copies = np.array([(0, source, block) for block, source in self._copies.items()], np.int32)
        for block in list(self._copies):
            self._forget_copy(block)
        return copies

    def check_idle(self) -> None:
        """Raise `ExecutorError` unless all blocks are free or keep a prefix."""
        self._pool.check()
        if self._pool.num_available != self.num_blocks or self._num_held.any() or self._copies:
            raise ExecutorError(
                f"{self.num_blocks - self._pool.num_available} of {self.num_blocks} cache blocks are held though no sequence "
                "runs; the block planner lost track of them"
            )

    def _copy(self, source: int, block: int) -> None:
        """Note a copy. Until the plan has it the source is held, so that it is not written for another sequence."""
        source = self._copies.get(source, source)  # a copy that is not made yet: take the original
        self._pool.share([source])
        self._copies[block] = source

    def _forget_copy(self, block: int) -> None:
        self._pool.drop(np.array([self._copies.pop(block)]))

    def _drop(self, seq_index: int) -> None:
        held = self.block_table(seq_index)
        for block in self._copies.keys() & set(held.tolist()) if self._copies else ():
            self._forget_copy(block)
        if self._new_blocks:  # it ends before a plan has told of its blocks, so the row may be another's in that plan
            self._new_blocks = [changes[changes[:, 1] != seq_index] for changes in self._new_blocks]
        self._pool.drop(held)
        self._num_held[seq_index] = 0

    def _append(self, seq_index: int, blocks: Int32Array) -> None:
        self._tables[seq_index, : len(blocks)] = blocks
        self._num_held[seq_index] = len(blocks)
        index = np.arange(len(blocks), dtype=np.int32)
        self._new_blocks.append(np.stack((np.zeros_like(index), np.full_like(index, seq_index), index, blocks), axis=1))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
