# SPDX-License-Identifier: Apache-2.0
"""How much device memory a rank keeps from step to step besides weights and cache: the plan, the batch's state, results, scales.

An upper bound, from numbers alone. Work lists and partial results of attention depend on the GPU and come out of
`phalanx.runtime.memory.RESERVE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.runtime.sampling.fields import (
    DEVICE_COLUMNS,
    MAX_ALTERNATIVES,
    MAX_PLAN_BIASES,
    MAX_TOKEN_BIASES,
    TOKEN_BIAS_WORDS,
)
from phalanx.runtime.sampling.mask_sizes import most_plan_mask_words

__all__ = ["ALLOCATION_BYTES", "fp8_scale_bytes", "state_bytes"]

ALLOCATION_BYTES = 512
"""Device allocations are rounded up to a multiple of this (CuPy's pool)."""

_WORD_BYTES = 4
_NUM_ARRAYS = 32
_HEADER_WORDS = 64
_ADMISSION_WORDS = -(-sum(int(kind[-1]) for _, kind in DEVICE_COLUMNS) // _WORD_BYTES)
_BIAS_ENTRY_WORDS = 2 + TOKEN_BIAS_WORDS
_PLAN_WORDS_PER_SEQ = 3 + 4 + 3 + _ADMISSION_WORDS + 1
_PLAN_WORDS_PER_TOKEN = 1 + 4
_PLAN_WORDS_PER_ROW = 3
_ROW_WORDS = 5 + _ADMISSION_WORDS + 2 + 2 * MAX_ALTERNATIVES
_SEQ_WORDS = 4 + _ADMISSION_WORDS + MAX_TOKEN_BIASES * TOKEN_BIAS_WORDS
_TOKEN_WORDS = 4


def state_bytes(max_num_seqs: int, max_num_tokens: int, blocks_per_seq: int, block_size: int, vocab_size: int) -> int:
    """The packed plan, block tables, sampling parameters and token biases, what kernels derive of a step, and its results."""
    seqs, tokens, rows = max_num_seqs, max_num_tokens, max_num_seqs + max_num_tokens
    plan = _HEADER_WORDS + seqs * _PLAN_WORDS_PER_SEQ + tokens * _PLAN_WORDS_PER_TOKEN + rows * _PLAN_WORDS_PER_ROW
    plan += 4 * blocks_per_seq + min(seqs * MAX_TOKEN_BIASES, MAX_PLAN_BIASES) * _BIAS_ENTRY_WORDS
    plan += most_plan_mask_words(vocab_size, seqs)
    batch = seqs * (blocks_per_seq + _SEQ_WORDS) + block_size + _HEADER_WORDS
    return (plan + batch + tokens * _TOKEN_WORDS + rows * _ROW_WORDS) * _WORD_BYTES + _NUM_ARRAYS * ALLOCATION_BYTES


def fp8_scale_bytes(num_kv_heads: Iterable[int]) -> int:
    """Of an fp8 cache: two scales for each key/value head that the rank has, layer by layer, and the count of saturated values."""
    scales = (-(-2 * heads * _WORD_BYTES // ALLOCATION_BYTES) * ALLOCATION_BYTES for heads in num_kv_heads)
    return sum(scales) + ALLOCATION_BYTES
