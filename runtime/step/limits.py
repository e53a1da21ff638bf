# SPDX-License-Identifier: Apache-2.0
"""The most that one step and the batch can hold: what state, kernels and buffers are sized by."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.runtime.sampling.fields import MAX_PLAN_BIASES, MAX_TOKEN_BIASES
from phalanx.runtime.sampling.mask_sizes import most_plan_mask_words
from phalanx.runtime.step.layout import STEP_LAYOUT

__all__ = ["StepLimits"]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Sizes of a rank's steps and of its batch state.

    Attributes:
        max_num_seqs: S, sequences that run at once.
        max_num_tokens: T, tokens of one step.
        max_model_len: tokens of one sequence, prompt and output.
        block_size: P, tokens in a block of the cache.
        vocab_size: V, which says how large token masks are.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_model_len: int
    block_size: int
    vocab_size: int

    @property
    def blocks_per_seq(self) -> int:
        """Blocks that the longest sequence needs."""
        return -(-self.max_model_len // self.block_size)

    @property
    def max_logit_rows(self) -> int:
        """A row that samples for each sequence, and all of a step's rows scored."""
        return self.max_num_seqs + self.max_num_tokens

    @property
    def max_plan_words(self) -> int:
        """Words of the largest packed plan, with as many cache blocks as `RunningSet` starts sequences for in one plan."""
        seqs, tokens = self.max_num_seqs, self.max_num_tokens
        return STEP_LAYOUT.most_words(
            num_seqs=seqs, num_tokens=tokens, num_rows=self.max_logit_rows,
            num_new_blocks=seqs + tokens + self.blocks_per_seq, num_copies=seqs, num_admissions=seqs,
            num_biases=min(seqs * MAX_TOKEN_BIASES, MAX_PLAN_BIASES),
            num_masks=seqs, num_mask_words=most_plan_mask_words(self.vocab_size, seqs),
        )  # fmt: skip
