# SPDX-License-Identifier: Apache-2.0
"""What every rank remembers of the running sequences between steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.fields import MAX_TOKEN_BIASES
from phalanx.runtime.step.layout import ADMISSION, TOKEN_BIAS, Int32Array
from phalanx.runtime.step.plan import StepPlan

__all__ = ["BatchState"]


@dataclass(slots=True)
class BatchState:
    """Block tables and sampling parameters of the running sequences; equal on all ranks.

    Attributes:
        block_tables: ``[cache groups, max_num_seqs, blocks per sequence]`` block ids.
        sampling: ``[max_num_seqs]`` of `ADMISSION`.
        biases: ``[max_num_seqs, MAX_TOKEN_BIASES]`` of `TOKEN_BIAS`; ``sampling`` says how many of a row count.
    """

    block_tables: Int32Array
    sampling: NDArray[np.void]
    biases: NDArray[np.void]

    @classmethod
    def empty(cls, max_num_seqs: int, max_blocks_per_seq: int, num_groups: int = 1) -> BatchState:
        """A state without sequences."""
        tables = np.zeros((num_groups, max_num_seqs, max_blocks_per_seq), np.int32)
        biases = np.zeros((max_num_seqs, MAX_TOKEN_BIASES), TOKEN_BIAS)
        return cls(tables, np.zeros(max_num_seqs, ADMISSION), biases)

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's new blocks, admissions and token biases.

        Raises:
            IndexError: a sequence, an index or a cache group is outside what the state was made for.
        """
        group, seq_index, index, block = plan.new_blocks.T
        self.block_tables[group, seq_index, index] = block
        self.sampling[plan.admissions["seq_index"]] = plan.admissions
        self.biases[plan.biases["seq_index"], plan.biases["index"]] = plan.biases["bias"]

    def sampling_of(self, plan: StepPlan) -> NDArray[np.void]:
        """``[Q]`` parameters of the plan's rows that sample."""
        return self.sampling[plan.seq_indices[plan.sampling_seqs]]

    def logprob_shape(self, plan: StepPlan) -> tuple[int, int]:
        """Rows of the plan's result with log-probabilities, and alternatives of each.

        Either all rows that sample or score, or none if no request asked.
        """
        asked = self.sampling_of(plan)["num_logprobs"]
        num_rows = plan.num_logit_rows
        has_scores = num_rows > len(asked)
        most = int(asked.max(initial=-1))
        if most < 0 and not has_scores:
            return 0, 0
        return num_rows, max(most, plan.num_alternatives if has_scores else 0)
