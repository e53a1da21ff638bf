"""What the scheduler needs from a plan of the key/value cache; it never sees a block id."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["CachePlanner"]

Int32Array = NDArray[np.int32]
SeqIndexArray = NDArray[np.intp]


class CachePlanner(Protocol):
    """Hands out blocks of `block_size` tokens to running sequences; executors hear of it by `take_new_blocks`."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds; some may keep a prefix for later."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Rows of the block table, which is how many sequences can hold blocks at once."""
        ...

    @property
    def max_tokens_per_seq(self) -> int:
        """Tokens that one sequence could hold if it had the cache to itself."""
        ...

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array) -> None:
        """Append the missing prefix keys, one per full block of ``token_ids``; none if nothing is shared."""
        ...

    def admit(
        self, seq_index: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        """Give ``seq_index`` room for ``num_tokens`` tokens if ``spare_blocks`` blocks stay free after it.

        ``expected_tokens`` is how far the sequence may grow: a hint for where to place it. Returns how many
        leading tokens are already in the cache, fewer than ``num_tokens`` and a multiple of the block size;
        None when it does not fit.
        """
        ...

    def extend(self, seq_indices: SeqIndexArray, positions: Int32Array) -> bool:
        """Give every sequence the block of its next position; False, with no change, if there are too few."""
        ...

    def mark_filled(self, seq_index: int, keys: list[bytes]) -> None:
        """Plans made so far fill the first ``len(keys)`` blocks of ``seq_index``: later plans may share them."""
        ...

    def release(self, seq_index: int, keys: list[bytes]) -> None:
        """Take all blocks back after `mark_filled`."""
        ...

    def discard(self, seq_index: int) -> None:
        """Take all blocks back and share none of them any more: what they hold is not to be trusted."""
        ...

    def take_new_blocks(self) -> Int32Array:
        """``[M, 4]`` (cache group, sequence, index in its block table, block id) since the last call.

        No place occurs twice. Call it once a plan, after every `admit`, `fork` and `extend` that the plan relies on.
        """
        ...

    def take_copies(self) -> Int32Array:
        """``[K, 3]`` (cache group, from block, to block) since the last call, as `StepPlan.copies` wants them."""
        ...
