# SPDX-License-Identifier: Apache-2.0
"""Step bookkeeping on the device. Every call enqueues on the current stream and does not wait.

A step begins with the packed plan in ``StepArrays.plan``; `update` derives from it what the other kernels read, and
`store_tokens` keeps what was sampled for the sequences' next step, so that tokens need not pass through the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require
from phalanx.kernels.library import KernelFunction, Library

__all__ = ["StepArrays", "plan_words", "store_tokens", "update"]

DeviceArray = Any
"""A ``cupy.ndarray``: what the kernels take, and slices of it."""

_HEADER_WORDS = 7
_NUM_THREADS = 512


def plan_words(max_num_seqs: int, max_num_tokens: int, admission_words: int) -> int:
    """Words of the largest packed plan: all sequences new, a block for each token, every row a prompt row."""
    per_seq, per_token = 4 + admission_words, 1 + 3 + 2
    return _HEADER_WORDS + per_seq * max_num_seqs + per_token * max_num_tokens


@dataclass(frozen=True, slots=True)
class StepArrays:
    """Device arrays, int32 unless said, whose addresses stay put.

    T and S are the most tokens and sequences that a step can hold; B is the most rows with logits.

    Attributes:
        plan: ``[W]`` the packed plan of the step.
        block_tables: ``[max_num_seqs, blocks per sequence]`` block ids.
        sampling: ``[max_num_seqs, A]`` sampling parameters, bits of `phalanx.runtime.step.ADMISSION`.
        last_tokens: ``[max_num_seqs]`` what each sequence sampled last.
        cu_seqlens: ``[S + 1]`` first row of each sequence.
        seq_lens, seq_indices: ``[S]`` length including this step's tokens; row of the block tables.
        num_seqs_and_decodes: ``[2]`` sequences, and how many of them have one token.
        token_ids, positions, slot_mapping: ``[T]``; -1 in the last marks a padding row.
        logit_rows: ``[B]`` rows that need logits; -1 = padding.
        row_seq_indices, row_positions, row_targets: ``[B]`` of each of them, sequence that samples there (-1 = none), position of
            the sampled token, token whose log-probability is wanted (-1 = none).
        row_sampling: ``[B, A]`` their sampling parameters, as in ``sampling``; all bits 0 where nothing is sampled.
    """

    plan: DeviceArray
    block_tables: DeviceArray
    sampling: DeviceArray
    last_tokens: DeviceArray
    cu_seqlens: DeviceArray
    seq_lens: DeviceArray
    seq_indices: DeviceArray
    num_seqs_and_decodes: DeviceArray
    token_ids: DeviceArray
    positions: DeviceArray
    slot_mapping: DeviceArray
    logit_rows: DeviceArray
    row_seq_indices: DeviceArray
    row_positions: DeviceArray
    row_targets: DeviceArray
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
        admission_words: int,
    ) -> StepArrays:
        """Take every array from ``array(name, shape, dtype)``, for example an arena's method."""
        seqs, tokens, rows = (max_num_seqs,), (max_num_tokens,), (max_logit_rows,)
        shapes: dict[str, tuple[int, ...]] = {
            "plan": (plan_words(max_num_seqs, max_num_tokens, admission_words),),
            "block_tables": (max_num_seqs, max_blocks_per_seq),
            "sampling": (max_num_seqs, admission_words),
            "last_tokens": seqs,
            "cu_seqlens": (max_num_seqs + 1,),
            "seq_lens": seqs,
            "seq_indices": seqs,
            "num_seqs_and_decodes": (2,),
            **dict.fromkeys(("token_ids", "positions", "slot_mapping"), tokens),
            **dict.fromkeys(("logit_rows", "row_seq_indices", "row_positions", "row_targets"), rows),
            "row_sampling": (max_logit_rows, admission_words),
        }
        return cls(**{name: array(name, shape, "int32") for name, shape in shapes.items()})


def update(library: Library, arrays: StepArrays, block_size: int, num_rows: int, num_logit_rows: int) -> None:
    """Derive the step from ``arrays.plan``; rows past its tokens and past its logit rows become padding."""
    require("plan", arrays.plan, arrays.plan.shape, "int32")
    max_blocks_per_seq = np.int32(arrays.block_tables.shape[1])
    apply_plan = _kernel(library, "apply_plan", arrays, block_size)
    apply_plan(
        (1,),
        (_NUM_THREADS,),
        (
            arrays.plan, arrays.block_tables, arrays.sampling, arrays.cu_seqlens, arrays.seq_lens, arrays.seq_indices,
            arrays.num_seqs_and_decodes, arrays.logit_rows, arrays.row_seq_indices, arrays.row_positions, arrays.row_targets,
            arrays.row_sampling,
            max_blocks_per_seq, np.int32(num_logit_rows),
        ),
    )  # fmt: skip
    fill_tokens = _kernel(library, "fill_tokens", arrays, block_size)
    fill_tokens(
        (ceil_div(num_rows, _NUM_THREADS),),
        (_NUM_THREADS,),
        (
            arrays.plan, arrays.block_tables, arrays.cu_seqlens, arrays.num_seqs_and_decodes, arrays.last_tokens, arrays.token_ids,
            arrays.positions, arrays.slot_mapping, max_blocks_per_seq, np.int32(num_rows),
        ),
    )  # fmt: skip


def store_tokens(library: Library, arrays: StepArrays, block_size: int, token_ids: Array, first_row: int = 0) -> None:
    """Keep the sampled tokens for the seq_indices' next step; other rows of ``token_ids`` get their targets.

    token_ids [B] int32, of the rows with logits from ``first_row`` on.
    """
    (num_rows,) = token_ids.shape
    rows = slice(first_row, first_row + num_rows)
    kernel = _kernel(library, "store_tokens", arrays, block_size)
    kernel(
        (ceil_div(num_rows, _NUM_THREADS),),
        (_NUM_THREADS,),
        (token_ids, arrays.row_seq_indices[rows], arrays.row_targets[rows], arrays.last_tokens, np.int32(num_rows)),
    )


def _kernel(library: Library, name: str, arrays: StepArrays, block_size: int) -> KernelFunction:
    admission_words = arrays.sampling.shape[1]
    return library.function(
        "step_update", name, NUM_THREADS=_NUM_THREADS, BLOCK_SIZE=block_size, ADMISSION_WORDS=admission_words
    )
