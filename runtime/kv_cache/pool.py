# SPDX-License-Identifier: Apache-2.0
"""Block ids: which are free, how many sequences hold each, and which prefix each one keeps."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.kv_cache.planner import Int32Array

__all__ = ["BlockPool"]

_SCAN_BLOCKS = 64
"""Ids looked at beyond four times what is wanted, before the whole pool is scanned."""


class BlockPool:
    """Reference counts and prefix keys of N blocks.

    A block is *held* (references > 0), *kept* (no reference, but a prefix key: a later prompt may want it) or
    *free*. Free blocks go first, then kept ones, the least recently released first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = np.zeros(num_blocks, np.int32)
        self._free = np.ones(num_blocks, np.bool_)
        self._num_free = num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cursor = 0

    @property
    def num_blocks(self) -> int:
        """N, blocks of the cache."""
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Blocks without a reference: free or kept."""
        return self._num_free + len(self._kept)

    def take(self, count: int, room: int = 0) -> Int32Array:
        """``count`` blocks with one reference each, consecutive ids where that is cheap to find.

        The next search starts ``room`` ids further on, so that `take_following` finds those ids free for a
        while.
        """
        assert count <= self.num_available, (count, self.num_available)
        from_free = min(count, self._num_free)
        ids = self._next_free(from_free)
        if from_free:
            self._cursor = (int(ids[-1]) + 1 + room) % self.num_blocks
            self._free[ids] = False
            self._num_free -= from_free
        if count > from_free:
            ids = np.concatenate((ids, self._evict(count - from_free)))
        self._references[ids] = 1
        return ids

    def take_following(self, ids: Int32Array) -> Int32Array:
        """One block each, ``ids + 1`` where that is free, so that runs grow in place; ids are distinct."""
        wanted = ids + 1
        wanted[wanted == self.num_blocks] = 0
        elsewhere = np.flatnonzero(~self._free[wanted])
        here = np.delete(wanted, elsewhere) if len(elsewhere) else wanted
        self._free[here] = False
        self._num_free -= len(here)
        self._references[here] = 1
        if len(elsewhere):
            wanted[elsewhere] = self.take(len(elsewhere))
        return wanted

    def drop(self, ids: Int32Array) -> None:
        """Give back one reference of each block, the first id the most worth keeping; ids are distinct."""
        self._references[ids] -= 1
        unheld = ids[self._references[ids] == 0]
        keyed = [block for block in reversed(unheld.tolist()) if block in self._key_of]
        self._free[unheld] = True
        self._free[keyed] = False
        self._num_free += len(unheld) - len(keyed)
        self._kept.update(dict.fromkeys(keyed))

    def find(self, keys: list[bytes]) -> list[int]:
        """Blocks that hold the longest known run of ``keys`` from the start."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_held(self, ids: list[int]) -> int:
        """How many of these blocks have a reference already."""
        return int(np.count_nonzero(self._references[ids])) if ids else 0

    def share(self, ids: list[int]) -> None:
        """Add a reference to each block, held or kept."""
        self._references[ids] += 1
        for block in ids:
            self._kept.pop(block, None)

    def set_key(self, block: int, key: bytes) -> None:
        """Let `find` know that a held block keeps this prefix; the first block with a key wins."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget_key(self, block: int) -> None:
        """Hide a held block from `find`."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def check(self) -> None:
        """Raise `ExecutorError` unless each block is exactly one of held, kept and free."""
        kept = np.zeros(self.num_blocks, np.bool_)
        kept[list(self._kept)] = True
        states = (self._references > 0).astype(np.int8) + kept + self._free
        if (states != 1).any() or (self._references < 0).any() or self._num_free != np.count_nonzero(self._free):
            wrong = np.flatnonzero(states != 1).tolist()
            raise ExecutorError(
                f"cache blocks {wrong[:8]} are not exactly one of held, kept and free; block accounting is broken"
            )

    def _next_free(self, count: int) -> Int32Array:
        if count == 0:
            return np.empty(0, np.int32)
        end = self._cursor + 4 * count + _SCAN_BLOCKS
        ahead = np.flatnonzero(self._free[self._cursor : end]) + self._cursor
        if len(ahead) < count:
            ahead = np.flatnonzero(self._free)
            ahead = np.roll(ahead, -int(np.searchsorted(ahead, self._cursor)))
        consecutive = ahead[count - 1 :] - ahead[: len(ahead) - count + 1] == count - 1
        first = int(consecutive.argmax())  # 0 where no run is long enough
        return ahead[first : first + count].astype(np.int32)

    def _evict(self, count: int) -> Int32Array:
        ids = [self._kept.popitem(last=False)[0] for _ in range(count)]
        for block in ids:
            self.forget_key(block)
        return np.sort(np.array(ids, np.int32))
