# SPDX-License-Identifier: Apache-2.0
"""Step bookkeeping on the device. Every call enqueues on the current stream and does not wait.

A step begins with the packed plan in ``StepArrays.plan``; `StepKernels.update` derives from it what the other kernels read,
and `store_tokens` keeps what was sampled for the sequences' next step, so that tokens need not pass through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require
from phalanx.kernels.library import KernelFunction, Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["StepArrays", "StepKernels"]

DeviceArray = Any
"""A ``cupy.ndarray``: what the kernels take, and slices of it."""

_NUM_THREADS = 512
_VECTOR_BYTES = 16
_MOST_COPY_BLOCKS = 64
"""Thread blocks for one copy: a page of 128 tokens and 8 heads of 128 is 256 KiB."""


@dataclass(slots=True)
class StepArrays:
    """Device arrays, int32 unless said, whose addresses stay put; `hold_tokens` alone replaces one.

    T and S are the most tokens and sequences that a step can hold; B is the most rows with logits.

    Attributes:
        plan: ``[W]`` the packed plan of the step.
        block_tables: ``[max_num_seqs, blocks per sequence]`` block ids.
        sampling: ``[max_num_seqs, A]`` sampling parameters, bits of `phalanx.runtime.step.ADMISSION`.
        biases: ``[max_num_seqs, N, 4]`` token biases, bits of `phalanx.runtime.step.TOKEN_BIAS`.
        last_tokens: ``[max_num_seqs]`` what each sequence sampled last.
        cached_tokens: ``[N, P]`` token of each position of the key/value cache's blocks.
        cu_seqlens: ``[S + 1]`` first row of each sequence.
        seq_lens, seq_indices: ``[S]`` length including this step's tokens; row of the block tables.
        num_seqs_and_decodes: ``[2]`` sequences, and how many of them have one token.
        token_ids, positions, slot_mapping: ``[T]``; -1 in the last marks a padding row.
        prefix_lens: ``[T]`` tokens of the prefix of each row's sequence (`AttentionSpec.prefix_end`), 0 = none.
        logit_rows: ``[B]`` rows that sample or score; -1 = padding.
        row_seq_indices, row_positions, row_targets: ``[B]`` of each of them, sequence that samples there (-1 = none), position of
            the sampled token, token whose log-probability is wanted (-1 = none).
        row_masks: ``[B]`` where in ``plan`` their token masks begin; -1 = none.
        row_sampling: ``[B, A]`` their sampling parameters, as in ``sampling``; all bits 0 where nothing is sampled.
    """

    plan: DeviceArray
    block_tables: DeviceArray
    sampling: DeviceArray
    biases: DeviceArray
    last_tokens: DeviceArray
    cached_tokens: DeviceArray
    cu_seqlens: DeviceArray
    seq_lens: DeviceArray
    seq_indices: DeviceArray
    num_seqs_and_decodes: DeviceArray
    token_ids: DeviceArray
    positions: DeviceArray
    slot_mapping: DeviceArray
    prefix_lens: DeviceArray
    logit_rows: DeviceArray
    row_seq_indices: DeviceArray
    row_positions: DeviceArray
    row_targets: DeviceArray
    row_masks: DeviceArray
    row_sampling: DeviceArray

    @classmethod
    def allocate(
        cls,
        array: Callable[[str, tuple[int, ...], str], DeviceArray],
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_logit_rows: int,
        max_blocks_per_seq: int,
        max_plan_words: int,
        admission_words: int,
        max_biases: int,
        block_size: int,
    ) -> StepArrays:
        """Take every array from ``array(name, shape, dtype)``, for example an arena's method."""
        seqs, tokens, rows = (max_num_seqs,), (max_num_tokens,), (max_logit_rows,)
        shapes: dict[str, tuple[int, ...]] = {
            "plan": (max_plan_words,),
            "block_tables": (max_num_seqs, max_blocks_per_seq),
            "sampling": (max_num_seqs, admission_words),
            "biases": (max_num_seqs, max_biases, 4),
            "last_tokens": seqs,
            "cached_tokens": (1, block_size),
            "cu_seqlens": (max_num_seqs + 1,),
            "seq_lens": seqs,
            "seq_indices": seqs,
            "num_seqs_and_decodes": (2,),
            **dict.fromkeys(("token_ids", "positions", "slot_mapping", "prefix_lens"), tokens),
            **dict.fromkeys(("logit_rows", "row_seq_indices", "row_positions", "row_targets", "row_masks"), rows),
            "row_sampling": (max_logit_rows, admission_words),
        }
        return cls(**{name: array(name, shape, "int32") for name, shape in shapes.items()})

    def hold_tokens(self, cached_tokens: DeviceArray) -> None:
        """Take an array for the blocks of a whole cache. Graphs captured before must not be replayed any more."""
        self.cached_tokens = cached_tokens


@dataclass(frozen=True, slots=True)
class StepKernels:
    """The kernels over one set of `StepArrays`.

    Args:
        block_size: P, tokens per cache block.
        layout: where a plan's parts lie: ``phalanx.runtime.step.STEP_LAYOUT.defines``.
    """

    library: Library
    arrays: StepArrays
    block_size: int
    layout: Mapping[str, int]

    def update(self, num_rows: int, num_logit_rows: int) -> None:
        """Derive the step from ``arrays.plan``; rows past its tokens and past its logit rows become padding."""
        arrays = self.arrays
        require("plan", arrays.plan, arrays.plan.shape, "int32")
        max_num_seqs, max_blocks_per_seq = map(np.int32, arrays.block_tables.shape)
        self._kernel("apply_plan")(
            (1,),
            (_NUM_THREADS,),
            (
                arrays.plan, arrays.block_tables, arrays.sampling, arrays.biases, arrays.cu_seqlens, arrays.seq_lens,
                arrays.seq_indices, arrays.num_seqs_and_decodes, arrays.logit_rows, arrays.row_seq_indices, arrays.row_positions,
                arrays.row_targets, arrays.row_masks, arrays.row_sampling, max_num_seqs, max_blocks_per_seq,
                np.int32(arrays.biases.shape[1]), np.int32(num_logit_rows),
            ),
        )  # fmt: skip
        self._kernel("fill_tokens")(
            (ceil_div(num_rows, _NUM_THREADS),),
            (_NUM_THREADS,),
            (
                arrays.plan, arrays.block_tables, arrays.sampling, arrays.cu_seqlens, arrays.last_tokens, arrays.token_ids,
                arrays.positions, arrays.slot_mapping, arrays.prefix_lens, arrays.cached_tokens, max_blocks_per_seq,
                np.int32(num_rows),
            ),
        )  # fmt: skip

    def store_tokens(self, token_ids: Array, first_row: int = 0) -> None:
        """Keep the sampled tokens for the sequences' next step; other rows of ``token_ids`` get their targets.

        token_ids [B] int32, of the rows with logits from ``first_row`` on; a sequence's last row counts.
        """
        (num_rows,) = token_ids.shape
        rows = slice(first_row, first_row + num_rows)
        arrays = self.arrays
        self._kernel("store_tokens")(
            (ceil_div(num_rows, _NUM_THREADS),),
            (_NUM_THREADS,),
            (token_ids, arrays.row_seq_indices[rows], arrays.row_targets[rows], arrays.last_tokens, np.int32(num_rows)),
        )

    def copy_blocks(self, pages: Array, num_copies: int) -> None:
        """Carry out the ``num_copies`` block copies of ``arrays.plan`` in ``pages`` [N, ...], whole vectors of 16 bytes a block."""
        block_bytes = pages.nbytes // pages.shape[0]
        if block_bytes % _VECTOR_BYTES:
            raise ExecutorError(f"a cache block of {block_bytes} bytes is not made of whole vectors of {_VECTOR_BYTES}")
        vectors = block_bytes // _VECTOR_BYTES
        grid = (num_copies, min(ceil_div(vectors, _NUM_THREADS), _MOST_COPY_BLOCKS))
        self._kernel("copy_blocks")(grid, (_NUM_THREADS,), (self.arrays.plan, pages, np.int32(vectors)))

    def _kernel(self, name: str) -> KernelFunction:
        defines = {"NUM_THREADS": _NUM_THREADS, "BLOCK_SIZE": self.block_size, **self.layout}
        return self.library.function("step_update", name, **defines)
