# SPDX-License-Identifier: Apache-2.0
"""Into how many micro-batches a pipeline's decoding sequences are divided."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.step.times import StepTimes

__all__ = ["PLANNING_SECONDS", "num_microbatches"]

PLANNING_SECONDS = 150e-6
"""What the scheduler takes for a step at 1,024 sequences: 110 to 155 us in ``docs/benchmarks/scheduler.md``. Broadcast, upload
and launches are part of the measured latency."""


def num_microbatches(num_seqs: NDArray[np.int64], most: int, times: StepTimes) -> NDArray[np.int64]:
    """The number that gives each of ``num_seqs`` sequences its next token soonest; of equal ones the smallest.

    A round of m micro-batches takes m steps of the slowest stage (m plannings where the host is slower), and no less than
    a micro-batch's way through all stages and its next planning. As many as stages leave the first stage idle while a
    result becomes the next step; one more hides that, but reads the weights once more. Fewer are left out: a stage would
    always be idle. So are attention's reads of older tokens, which grow with the sequences of a step: they take as long
    in a round of many micro-batches as of few.

    Args:
        num_seqs: ``[n]`` decoding sequences.
        most: steps of different sequences that can be in flight.

    Returns:
        ``[n]`` from the number of stages to ``most``.
    """
    counts = np.arange(min(times.num_stages, most), most + 1)[:, None]
    rows = -(-num_seqs // counts)
    busy = counts * np.maximum(times.stage(rows), PLANNING_SECONDS)
    rounds = np.maximum(busy, times.latency(rows) + PLANNING_SECONDS)
    chosen: NDArray[np.int64] = counts[0, 0] + rounds.argmin(axis=0)
    return chosen
