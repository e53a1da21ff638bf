# SPDX-License-Identifier: Apache-2.0
"""Token masks: which tokens a sequence may choose next, a bit for each.

The leader makes them and a plan carries those of its rows, so ranks keep nothing of them and a sequence without a mask costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.biases import BAN
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.sampling.mask_sizes import mask_words

__all__ = ["AllowedTokens", "GuideMasks", "RowMasks", "TokenMask", "apply_mask", "pack_mask"]

Int32Array = NDArray[np.int32]

RowMasks = Mapping[int, Int32Array]
"""Masks of those rows that have one."""


class TokenMask(Protocol):
    """The masks of one sequence, one after the other."""

    @property
    def follows_tokens(self) -> bool:
        """Whether each mask depends on the token before it, so that a step has to wait for the result of the last."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there, so that `words` does not wait. Never true of a mask with a `problem`."""
        ...

    @property
    def problem(self) -> str | None:
        """Why there is no next mask, once that is known; the sequence then ends with this error."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for the next mask, but not for longer."""
        ...

    def words(self) -> Int32Array:
        """The next mask, ``[mask_words(V)]``; waits for it."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on after a token that was chosen."""
        ...


class GuideMasks(Protocol):
    """Makes masks of guides."""

    def start(self, guide: Guide) -> TokenMask:
        """The masks of a new sequence; does not wait for the first."""
        ...


class AllowedTokens:
    """The same mask for every token."""

    follows_tokens, is_ready, problem = False, True, None

    def __init__(self, token_ids: Iterable[int], vocab_size: int) -> None:
        self._words = pack_mask(token_ids, vocab_size)

    def wait(self, seconds: float) -> None:
        """It is there."""

    def words(self) -> Int32Array:
        """The mask."""
        return self._words

    def accept(self, token_id: int) -> None:
        """Nothing changes."""


def pack_mask(token_ids: Iterable[int], vocab_size: int) -> Int32Array:
    """``[mask_words(V)]`` with the bits of ``token_ids`` set, the lowest bit of a word first."""
    bits = np.zeros(mask_words(vocab_size) * 32, np.uint8)
    bits[np.fromiter(token_ids, np.intp)] = 1
    packed: Int32Array = np.packbits(bits, bitorder="little").view("<i4")
    return packed


def apply_mask(logits: NDArray[np.float32], words: Int32Array) -> None:
    """Ban the tokens of one row of logits ``[V]`` whose bits are not set, in place. Logits that are not finite still show."""
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)]
    logits[(allowed == 0) & np.isfinite(logits)] = BAN
