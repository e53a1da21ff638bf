# SPDX-License-Identifier: Apache-2.0
"""One step, as all ranks see it: what to compute and what changes before, in one buffer that is packed once.

All ranks hold the same `BatchState` and apply the same changes (new cache blocks, sampling parameters of admitted
sequences), so a plan in steady decoding is a few integers per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.step.layout import ADMISSION, STEP_LAYOUT, TOKEN_BIAS_ENTRY, Int32Array, RowKind

__all__ = ["StepPlan"]

_NO_BLOCKS, _NO_COPIES = np.empty((0, 4), np.int32), np.empty((0, 3), np.int32)
_NO_ADMISSIONS, _NO_BIASES = np.empty(0, ADMISSION), np.empty(0, TOKEN_BIAS_ENTRY)
_NO_ROWS, _NO_MASKS = np.empty(0, np.int32), np.empty((0, 0), np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What to compute in one step; every array is a view of ``words``.

    Sequences with one token come first, then prompt chunks; the step's T rows follow that order. Block copies read what
    earlier steps left, whatever this plan's new blocks say.

    Attributes:
        words: the plan in the layout of `STEP_LAYOUT`: what is broadcast and uploaded.
        step_id: consecutive number.
        pass_id: which of the model's passes the step runs; 0 = decode.
        num_decodes: sequences, all at the front, that compute exactly one token.
        num_alternatives: alternatives to report for rows of kind SCORE.
        seq_indices: ``[S]`` rows of the batch state, each at most once.
        starts: ``[S]`` position of the first token computed; everything before it is in the cache.
        num_scheduled_tokens: ``[S]`` tokens computed, at least 1.
        token_ids: ``[T]`` input tokens, T = sum(num_scheduled_tokens); `PENDING_TOKEN` where only the executor knows it.
        rows: ``[B]`` rows of the step that yield something, any number of a sequence; ascending among those of a kind.
        kinds: ``[B]`` of `RowKind`, ascending: rows that sample, then rows that score, then hidden states.
        targets: ``[B]`` token ids that rows of kind SCORE score; -1 elsewhere.
        new_blocks: ``[num_new_blocks, 4]`` (cache group, sequence, index in its block table, block id), applied before the step.
        copies: ``[num_copies, 3]`` (cache group, from block, to block), copied in all layers before the step. No block is both
            source and destination, and a destination occurs once.
        admissions: ``[num_admissions]`` of `ADMISSION`, applied before the step.
        biases: ``[num_biases]`` of `TOKEN_BIAS_ENTRY`, token biases of admitted sequences, applied before the step.
        masked_rows: ``[num_masked]`` which of ``rows``, all of which sample, choose only tokens of a mask.
        masks: ``[num_masked, ceil(V / 32)]`` their masks, see `sampling.masks`.
    """

    words: Int32Array
    step_id: int
    pass_id: int
    num_decodes: int
    num_alternatives: int
    seq_indices: Int32Array
    starts: Int32Array
    num_scheduled_tokens: Int32Array
    token_ids: Int32Array
    rows: Int32Array
    kinds: Int32Array
    targets: Int32Array
    new_blocks: Int32Array
    copies: Int32Array
    admissions: NDArray[np.void]
    biases: NDArray[np.void]
    masked_rows: Int32Array
    masks: Int32Array

    @classmethod
    def pack(
        cls,
        step_id: int,
        seq_indices: Int32Array,
        starts: Int32Array,
        num_scheduled_tokens: Int32Array,
        token_ids: Int32Array,
        rows: Int32Array,
        kinds: Int32Array | None = None,
        targets: Int32Array | None = None,
        *,
        new_blocks: Int32Array = _NO_BLOCKS,
        copies: Int32Array = _NO_COPIES,
        admissions: NDArray[np.void] = _NO_ADMISSIONS,
        biases: NDArray[np.void] = _NO_BIASES,
        masked_rows: Int32Array = _NO_ROWS,
        masks: Int32Array = _NO_MASKS,
        pass_id: int = 0,
        num_alternatives: int = 0,
    ) -> StepPlan:
        """Write down a step; without ``kinds`` and ``targets`` all ``rows`` sample."""
        num_rows = len(rows)
        num_decodes = int((num_scheduled_tokens > 1).searchsorted(True))
        tables = (
            seq_indices, starts, num_scheduled_tokens, token_ids, rows,
            np.zeros(num_rows, np.int32) if kinds is None else kinds,
            np.full(num_rows, -1, np.int32) if targets is None else targets,
            new_blocks, copies, admissions, biases, masked_rows, masks.reshape(-1),
        )  # fmt: skip
        return cls.unpack(STEP_LAYOUT.pack((step_id, pass_id, num_decodes, num_alternatives), tables))

    @classmethod
    def unpack(cls, words: Int32Array) -> StepPlan:
        """Read a packed plan; the result aliases ``words``."""
        (step_id, pass_id, num_decodes, num_alternatives, *_), tables = STEP_LAYOUT.unpack(words)
        seq_indices, starts, num_scheduled_tokens, token_ids, rows, kinds, targets, *changes = tables
        new_blocks, copies, admissions, biases, masked_rows, masks = changes
        return cls(
            words, step_id, pass_id, num_decodes, num_alternatives, seq_indices, starts, num_scheduled_tokens, token_ids,
            rows, kinds, targets, new_blocks.reshape(-1, 4), copies.reshape(-1, 3), admissions.view(ADMISSION),
            biases.view(TOKEN_BIAS_ENTRY), masked_rows,
            masks.reshape(len(masked_rows), -1) if len(masked_rows) else _NO_MASKS,
        )  # fmt: skip

    @property
    def num_seqs(self) -> int:
        """S, sequences of the step."""
        return len(self.seq_indices)

    @property
    def num_tokens(self) -> int:
        """T, tokens of the step."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """How many rows, the first ones of ``rows``, sample a token."""
        return int(self.kinds.searchsorted(RowKind.SCORE))

    @property
    def num_logit_rows(self) -> int:
        """How many rows, the first ones of ``rows``, sample or score."""
        return int(self.kinds.searchsorted(RowKind.HIDDEN))

    @property
    def cu_seqlens(self) -> Int32Array:
        """``[S + 1]`` first row of each sequence, and T."""
        return np.concatenate(([0], np.cumsum(self.num_scheduled_tokens))).astype(np.int32)

    @property
    def positions(self) -> Int32Array:
        """``[T]`` position of each of the step's rows in its sequence."""
        first_rows = np.repeat(self.cu_seqlens[:-1] - self.starts, self.num_scheduled_tokens)
        return np.arange(self.num_tokens, dtype=np.int32) - first_rows

    @property
    def row_masks(self) -> dict[int, Int32Array]:
        """The masks by row, an index into ``rows``."""
        return dict(zip(self.masked_rows.tolist(), self.masks, strict=True))

    @property
    def sampling_seqs(self) -> NDArray[np.intp]:
        """``[Q]`` for each row that samples, which of the S sequences it belongs to."""
        seqs: NDArray[np.intp] = self.cu_seqlens.searchsorted(self.rows[: self.num_sampled], "right") - 1
        return seqs

    @property
    def sampled_positions(self) -> Int32Array:
        """``[Q]`` positions of the tokens that are sampled."""
        seqs = self.sampling_seqs
        offsets = self.rows[: self.num_sampled] - self.cu_seqlens[seqs]
        positions: Int32Array = self.starts[seqs] + offsets + np.int32(1)
        return positions
