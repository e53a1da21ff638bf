# SPDX-License-Identifier: Apache-2.0
"""Slots: each sequence owns one linear stretch of the cache, as long as the longest sequence."""

from __future__ import annotations

import numpy as np

from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.runtime.kv_cache.planner import Int32Array, SeqIndexArray

__all__ = ["SlotPlanner"]


class SlotPlanner:
    """`CachePlanner` for TensorRT's linear caches: block i is the slot of sequence i, and nothing is shared."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        if max_num_seqs < 1 or max_model_len < 1:
            raise ConfigError(f"{max_num_seqs} slots of {max_model_len} tokens hold nothing; use at least 1 of each")
        self._block_size = max_model_len
        self._used = np.zeros(max_num_seqs, np.bool_)
        self._new_indices: list[int] = []

    @property
    def block_size(self) -> int:
        """Tokens per slot."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """How many slots there are."""
        return len(self._used)

    @property
    def num_free_blocks(self) -> int:
        """Slots without a sequence."""
        return len(self._used) - int(self._used.sum())

    @property
    def max_num_seqs(self) -> int:
        """How many sequences can run at once: one per slot."""
        return len(self._used)

    @property
    def max_tokens_per_seq(self) -> int:
        """Tokens per slot."""
        return self._block_size

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array, salt: bytes = b"") -> None:
        """Nothing is shared, so there are no keys."""

    def admit(
        self, seq_index: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        """Take the slot; it always fits, and nothing of it is in the cache yet."""
        assert num_tokens <= self._block_size, (num_tokens, self._block_size)
        assert not self._used[seq_index], seq_index
        self._used[seq_index] = True
        self._new_indices.append(seq_index)
        return 0

    def fork(
        self, seq_index: int, parent: int, num_shared: int, num_tokens: int, expected_tokens: int, spare_blocks: int
    ) -> int | None:
        """Take the slot; nothing is shared."""
        return self.admit(seq_index, num_tokens, expected_tokens, [], spare_blocks)

    def extend(self, seq_indices: SeqIndexArray, positions: Int32Array) -> bool:
        """A slot is as long as the longest sequence."""
        return True

    def mark_filled(self, seq_index: int, keys: list[bytes]) -> None:
        """Nothing is shared."""

    def release(self, seq_index: int, keys: list[bytes]) -> None:
        """Free the slot."""
        self.discard(seq_index)

    def discard(self, seq_index: int) -> None:
        """Free the slot."""
        assert self._used[seq_index], seq_index
        self._used[seq_index] = False
        self._new_indices = [other for other in self._new_indices if other != seq_index]

    def take_new_blocks(self) -> Int32Array:
        """``[num_new_blocks, 4]`` (0, seq_index, 0, seq_index) of the slots taken since the last call."""
        seq_indices = np.array(self._new_indices, np.int32)
        self._new_indices.clear()
        return np.stack((zeros := np.zeros_like(seq_indices), seq_indices, zeros, seq_indices), axis=1)

    def take_copies(self) -> Int32Array:
        """None: nothing is shared."""
        return np.empty((0, 3), np.int32)

    def check_idle(self) -> None:
        """Raise `ExecutorError` unless all slots are free."""
        if self._used.any():
            raise ExecutorError(f"slots {np.flatnonzero(self._used).tolist()} are held though no sequence runs")
