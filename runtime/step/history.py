# SPDX-License-Identifier: Apache-2.0
"""Token ids of the positions in the cache, in blocks like keys and values: what penalties count."""

from __future__ import annotations

import numpy as np

from phalanx.runtime.step.layout import Int32Array
from phalanx.runtime.step.plan import StepPlan
from phalanx.runtime.step.state import BatchState

__all__ = ["TokenHistory"]


class TokenHistory:
    """The tokens of each running sequence, kept on the host.

    A block is shared, copied and taken over together with its keys and values, so prefix reuse, forks and preemption need nothing
    else here, and a plan never carries tokens that an earlier one computed.

    Args:
        state: of the same batch; its block tables say where a sequence's tokens are.
    """

    def __init__(self, state: BatchState, num_blocks: int, block_size: int) -> None:
        self._state = state
        self._blocks = np.zeros((num_blocks, block_size), np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Carry out the plan's block copies and store the tokens that it computes; ``state`` holds its changes already."""
        if len(plan.copies):
            _, source, destination = plan.copies.T
            self._blocks[destination] = self._blocks[source]
        positions, size = plan.positions, self._blocks.shape[1]
        seq_indices = np.repeat(plan.seq_indices, plan.num_scheduled_tokens)
        self._blocks[self._state.block_tables[0, seq_indices, positions // size], positions % size] = plan.token_ids

    def tokens(self, seq_index: int, length: int) -> Int32Array:
        """``[length]`` first tokens of a sequence, prompt and output."""
        blocks = self._state.block_tables[0, seq_index, : -(-length // self._blocks.shape[1])]
        return self._blocks[blocks].reshape(-1)[:length]
