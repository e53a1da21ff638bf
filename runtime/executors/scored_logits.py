# SPDX-License-Identifier: Apache-2.0
"""Who wants to see the logits of rows that score, besides their log-probabilities: comparisons over the whole vocabulary."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.step import BatchState, StepPlan

__all__ = ["LogitsReader", "show_scored"]


class LogitsReader(Protocol):
    """Called on every rank that holds logits, with its own share of the vocabulary; a preempted sequence's rows may come twice."""

    def __call__(
        self, seeds: NDArray[np.uint64], positions: NDArray[np.int32], first_token: int, logits: NDArray[np.float32]
    ) -> None:
        """Look at the logits of B rows.

        Args:
            seeds: ``[B]`` of the rows' sequences: what a caller tells its requests apart by on every rank.
            positions: ``[B]`` of the rows in their sequences.
            first_token: id of the token of the first column.
            logits: ``[B, V local]`` without padding; may be overwritten after the call.
        """
        ...


def show_scored(
    reader: LogitsReader, plan: StepPlan, state: BatchState, rows: slice | NDArray[np.int32], first_token: int,
    logits: NDArray[np.float32],
) -> None:  # fmt: skip
    """Give ``reader`` the logits of ``rows``, indices into the rows of ``plan``, all of which score."""
    step_rows = plan.rows[rows]
    seqs = plan.cu_seqlens.searchsorted(step_rows, "right") - 1
    seeds = state.sampling["seed"][plan.seq_indices[seqs]]
    reader(seeds, plan.positions[step_rows], first_token, logits)
