"""Paged blocks with reference counts; full blocks with the same prefix are shared."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.kv_cache.planner import Int32Array, SeqIndexArray
from phalanx.runtime.kv_cache.pool import BlockPool

__all__ = ["BlockPlanner"]

_KEY_BYTES = 16


class BlockPlanner:
    """`CachePlanner` over N blocks of P tokens.

    The key of a full block is a 128-bit BLAKE2 digest of its tokens and the key before it, so a key stands
    for a whole prefix. It is cryptographic because prompts of different users meet here: nobody must be able
    to make two prefixes collide.

    Args:
        salt: prefixes are shared only between planners' sequences of the same salt (a model or adapter name).
        share_prefixes: False computes every prompt in full.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        share_prefixes: bool = True,
        salt: bytes = b"",
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
        self._root_key = blake2b(salt, digest_size=_KEY_BYTES).digest()
        self._new_blocks: list[Int32Array] = []

    @property
    def block_size(self) -> int:
        """P."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """N."""
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

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array) -> None:
        """Append the keys of full blocks of ``token_ids`` that ``keys`` lacks."""
        if not self._share_prefixes:
            return
        tokens = token_ids.tobytes()
        width = self._block_size * token_ids.itemsize
        key = keys[-1] if keys else self._root_key
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

    def extend(self, seq_indices: SeqIndexArray, positions: Int32Array) -> bool:
        """One more block for each sequence whose next position starts one, if there are enough."""
        growing = seq_indices[positions >= self._num_held[seq_indices] * self._block_size]
        if len(growing) > self._pool.num_available:
            return False
        if len(growing):
            index = self._num_held[growing]
            # Distinct: admission leaves a token to compute, so a sequence's last block is never another's.
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
        self._pool.drop(self.block_table(seq_index))
        self._num_held[seq_index] = 0

    def discard(self, seq_index: int) -> None:
        """Take the blocks back and forget what they hold, shared ones included."""
        for block in self.block_table(seq_index).tolist():
            self._pool.forget_key(block)
        self._pool.drop(self.block_table(seq_index))
        self._num_held[seq_index] = 0

    def take_new_blocks(self) -> Int32Array:
        """Changes of the block tables since the last call."""
        if not self._new_blocks:
            return np.empty((0, 4), np.int32)
        changes = np.concatenate(self._new_blocks)
        self._new_blocks.clear()
        return changes

    def take_copies(self) -> Int32Array:
        """Blocks to copy since the last call."""
        return np.empty((0, 3), np.int32)

    def _append(self, seq_index: int, blocks: Int32Array) -> None:
        self._tables[seq_index, : len(blocks)] = blocks
        self._num_held[seq_index] = len(blocks)
        index = np.arange(len(blocks), dtype=np.int32)
        self._new_blocks.append(np.stack((np.zeros_like(index), np.full_like(index, seq_index), index, blocks), axis=1))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
