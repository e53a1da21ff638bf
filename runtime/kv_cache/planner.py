# SPDX-License-Identifier: Apache-2.0
"""What the scheduler needs from a plan of the key/value cache; it never sees a block id."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["CachePlanner", "Int32Array", "SeqIndexArray"]

Int32Array = NDArray[np.int32]
SeqIndexArray = NDArray[np.intp]


class CachePlanner(Protocol):
    """Hands out blocks of `block_size` tokens to running sequences; executors learn of it by `take_new_blocks`, `take_copies`.

    The order for each plan: `release` or `discard` what ended, `extend` what decodes, `admit` or `fork` what starts, then
    `take_new_blocks` and `take_copies` once, and `mark_filled` when the plan is made. Plans run in the order in which they were
    made, so what a plan may read is what earlier plans wrote.
    """

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

    def extend_keys(self, keys: list[bytes], token_ids: Int32Array, salt: bytes = b"") -> None:
        """Append the missing prefix keys, one per full block of ``token_ids``; none if nothing is shared.

        Args:
            keys: of the same tokens and salt so far.
            salt: prefixes are shared only between sequences of one salt (an adapter's name, a tenant's secret).
        """
        ...

    def admit(
        self, seq_index: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        """Give ``seq_index``, which holds nothing, room for ``num_tokens`` if ``spare_blocks`` blocks stay free after it.

        ``expected_tokens`` is how far the sequence may grow: a hint for where to place it. Returns how many leading tokens are
        already in the cache, fewer than ``num_tokens`` and a multiple of the block size; None when it does not fit.
        """
        ...

    def fork(
        self, seq_index: int, parent: int, num_shared: int, num_tokens: int, expected_tokens: int, spare_blocks: int
    ) -> int | None:
        """Like `admit`, with the first ``num_shared`` tokens from a running sequence instead of from known prefixes.

        Plans made so far must fill these positions of ``parent``, and ``num_shared < num_tokens``. Full blocks are shared; the
        last one, where it is partly filled, becomes a copy, so that both sequences may go on writing. Returns
        ``num_shared``, or 0 from a cache that cannot share; None when it does not fit.
        """
        ...

    def extend(self, seq_indices: SeqIndexArray, positions: Int32Array) -> bool:
        """Give every sequence the block of its next position; False, with no change, if there are too few.

        ``positions`` are at most one past what each sequence has room for.
        """
        ...

    def mark_filled(self, seq_index: int, keys: list[bytes]) -> None:
        """Plans made so far fill the first ``len(keys)`` blocks of ``seq_index``: later plans may share them.

        Not to be called before the plan is made: a plan must not share what it computes itself.
        """
        ...

    def release(self, seq_index: int, keys: list[bytes]) -> None:
        """Take all blocks back after `mark_filled`."""
        ...

    def discard(self, seq_index: int) -> None:
        """Take all blocks back and share none of them any more: what they hold is not to be trusted."""
        ...

    def take_new_blocks(self) -> Int32Array:
        """``[num_new_blocks, 4]`` (cache group, sequence, index in its block table, block id) since the last call; no place occurs twice."""
        ...

    def take_copies(self) -> Int32Array:
        """``[num_copies, 3]`` (cache group, from block, to block) since the last call, as `StepPlan.copies` wants them."""
        ...

    def check_idle(self) -> None:
        """Make sure that no block is held; to be called when no sequence runs.

        Raises:
            ExecutorError: blocks are held or lost, so later sequences would get less room or each other's tokens.
        """
        ...
