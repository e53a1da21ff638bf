"""Fixed slots: each sequence owns one linear stretch of the cache, as long as the longest sequence."""

from __future__ import annotations

import numpy as np

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.kv_cache.planner import Int32Array, SlotArray

__all__ = ["SlotPlanner"]


class SlotPlanner:
    """`CachePlanner` for TensorRT's linear caches: slot i holds block i, and nothing is shared."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        if max_num_seqs < 1 or max_model_len < 1:
            raise ConfigError(f"{max_num_seqs} slots of {max_model_len} tokens hold nothing; use at least 1 of each")
        self._block_size = max_model_len
        self._used = np.zeros(max_num_seqs, np.bool_)
        self._new_slots: list[int] = []

    @property
    def block_size(self) -> int:
        """Tokens per slot."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """Slots."""
        return len(self._used)

    @property
    def num_free_blocks(self) -> int:
        """Slots without a sequence."""
        return len(self._used) - int(self._used.sum())

    @property
    def num_slots(self) -> int:
        """Slots."""
        return len(self._used)

    @property
    def max_tokens_per_seq(self) -> int:
        """Tokens per slot."""
        return self._block_size

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array) -> None:
        """Nothing is shared, so there are no keys."""

    def admit(
        self, slot: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        """Take the slot; it always fits, and nothing of it is in the cache yet."""
        assert num_tokens <= self._block_size, (num_tokens, self._block_size)
        assert not self._used[slot], slot
        self._used[slot] = True
        self._new_slots.append(slot)
        return 0

    def extend(self, slots: SlotArray, positions: Int32Array) -> bool:
        """A slot is as long as the longest sequence."""
        return True

    def mark_filled(self, slot: int, keys: list[bytes]) -> None:
        """Nothing is shared."""

    def release(self, slot: int, keys: list[bytes]) -> None:
        """Free the slot."""
        self.discard(slot)

    def discard(self, slot: int) -> None:
        """Free the slot."""
        assert self._used[slot], slot
        self._used[slot] = False

    def take_new_blocks(self) -> Int32Array:
        """``[M, 3]`` (slot, 0, slot) of the slots taken since the last call."""
        slots = np.array(self._new_slots, np.int32)
        self._new_slots.clear()
        return np.stack((slots, np.zeros_like(slots), slots), axis=1)
