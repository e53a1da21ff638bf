"""How long decoding steps take on this machine: what an executor measures once and a scheduler plans with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepTimes"]

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of steps in which each of some sequences computes one token, without what attention spends on older tokens.

    Attributes:
        num_stages: pipeline stages.
        rows: sequences of the steps that were measured, ascending.
        stage_seconds: device time of the slowest stage for each of them, waiting for other stages not counted.
        latency_seconds: on the leader's host, from the start of such a step alone in the pipe to its result.

    Raises:
        ValueError: the columns do not form a table.
    """

    num_stages: int
    rows: tuple[int, ...]
    stage_seconds: tuple[float, ...]
    latency_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rows or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows={self.rows} do not ascend; measure each number of sequences once")
        if not len(self.rows) == len(self.stage_seconds) == len(self.latency_seconds):
            raise ValueError(
                f"{len(self.rows)} rows have {len(self.stage_seconds)} stage times and {len(self.latency_seconds)} "
                "latencies; give one of each for each"
            )

    def stage(self, num_seqs: NDArray[Any]) -> Float64Array:
        """`stage_seconds` of any numbers of sequences: linear in between, the nearest measured one outside."""
        seconds: Float64Array = np.interp(num_seqs, self.rows, self.stage_seconds)
        return seconds

    def latency(self, num_seqs: NDArray[Any]) -> Float64Array:
        """`latency_seconds` in the same way."""
        seconds: Float64Array = np.interp(num_seqs, self.rows, self.latency_seconds)
        return seconds
