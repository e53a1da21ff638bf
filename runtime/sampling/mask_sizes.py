# SPDX-License-Identifier: Apache-2.0
"""How large token masks are, and how many of them fit into a plan."""

from __future__ import annotations

__all__ = ["MAX_PLAN_MASK_WORDS", "mask_words", "most_masked_seqs", "most_plan_mask_words"]

MAX_PLAN_MASK_WORDS = 1 << 21
"""8 MiB: masks of 256 sequences with a vocabulary of 256,000 tokens, of 2,097 with 32,000."""


def mask_words(vocab_size: int) -> int:
    """Words of one mask: a bit for each token."""
    return -(-vocab_size // 32)


def most_masked_seqs(vocab_size: int) -> int:
    """Maximum number of sequences with masks that run at once, so that a plan has room for all of them."""
    return max(1, MAX_PLAN_MASK_WORDS // mask_words(vocab_size))


def most_plan_mask_words(vocab_size: int, max_num_seqs: int) -> int:
    """Room for masks in the largest plan."""
    return min(max_num_seqs, most_masked_seqs(vocab_size)) * mask_words(vocab_size)
