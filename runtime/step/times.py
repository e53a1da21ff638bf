# SPDX-License-Identifier: Apache-2.0
"""How long steps take on this machine: decoding steps, measured once for the scheduler, and all that ran, for reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DeviceTimes", "StepTimes"]

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """What a device did since its executor started, by the device's own clock.

    Attributes:
        busy_seconds: from the start of a step's first operation to the end of its last.
        idle_seconds: from the end of a step to the start of the next, where the host had more to plan: where the next
            was started before the result of the one before was taken.
    """

    busy_seconds: float = 0.0
    idle_seconds: float = 0.0

    def __add__(self, other: DeviceTimes) -> DeviceTimes:
        return DeviceTimes(self.busy_seconds + other.busy_seconds, self.idle_seconds + other.idle_seconds)

    def __sub__(self, earlier: DeviceTimes) -> DeviceTimes:
        return DeviceTimes(self.busy_seconds - earlier.busy_seconds, self.idle_seconds - earlier.idle_seconds)

    @property
    def idle_fraction(self) -> float:
        """Share of the time in which the device had nothing to do; 0 of no time."""
        total = self.busy_seconds + self.idle_seconds
        return self.idle_seconds / total if total else 0.0


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
