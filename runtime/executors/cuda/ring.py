# SPDX-License-Identifier: Apache-2.0
"""Steps in flight, as the host sees them: pinned buffers and events, used in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.nccl_comm import DeviceCommunicator, wait_for
from phalanx.runtime.executors.cuda.memory import pinned_array
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.step import StepPlan, StepResult
from phalanx.runtime.step.times import DeviceTimes

__all__ = ["StepBuffers", "StepRing"]

STEP_TIMEOUT_SECONDS = 300.0
"""A step that takes longer is taken for lost; the longest honest one is a few seconds."""


@dataclass(slots=True)
class StepBuffers:
    """One step in flight.

    Attributes:
        plan_words, result_words: pinned memory that the device reads the plan from and writes the results to.
        saturated: pinned ``[1]``, the device's count of saturated values after the step.
        start, end: events around the step's work on the device; ``result`` when the pinned result is there.
        number: counts the uses of all buffers.
        follows: it was started before the step before it was collected.
    """

    plan_words: NDArray[np.int32]
    result_words: NDArray[np.int32]
    saturated: NDArray[np.int32]
    start: Any
    end: Any
    result: Any
    number: int = 0
    in_use: bool = False
    follows: bool = False
    step_id: int = 0
    num_rows: int = 0
    layout: ResultLayout = field(default_factory=lambda: ResultLayout(0))

    def describe(self, plan: StepPlan, layout: ResultLayout) -> None:
        """Remember what the result will mean."""
        self.in_use = True
        self.step_id, self.num_rows = plan.step_id, plan.num_logit_rows
        self.layout = layout

    def read(self) -> StepResult:
        """The result, after ``result`` has passed."""
        return self.layout.result(self.step_id, self.num_rows, self.result_words)


class StepRing:
    """Buffers for as many steps as can be in flight and one more, so that the next are free without waiting for the newest.

    Args:
        groups: what the steps communicate by; ``drop_graphs`` forgets the captured ones. See `wait_for`.
    """

    def __init__(
        self, size: int, plan_words: int, result_words: int, groups: Sequence[DeviceCommunicator],
        drop_graphs: Callable[[], None],
    ) -> None:  # fmt: skip
        import cupy

        self._groups, self._drop_graphs = groups, drop_graphs
        self._ring = [
            StepBuffers(
                pinned_array((plan_words,), np.int32),
                pinned_array((max(result_words, 1),), np.int32),
                pinned_array((1,), np.int32),
                *(cupy.cuda.Event() for _ in range(3)),
            )
            for _ in range(size)
        ]
        for buffers in self._ring:
            buffers.saturated[:] = 0
        self._next = self._num_acquired = 0
        self._num_saturated = self._last_saturated = self._last_counted = 0
        self.times = DeviceTimes()

    @property
    def num_saturated(self) -> int:
        """Values that did not fit fp8 pages, over the steps that the device has finished."""
        for buffers in (*self._ring[self._next :], *self._ring[: self._next]):  # from the oldest
            if buffers.in_use and buffers.end.done:
                self._count(buffers)
        return self._num_saturated

    def acquire(self) -> StepBuffers:
        """The next buffers, in turn; waits for the device if it is still on the step that used it before."""
        buffers = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if buffers.in_use:
            self.wait(buffers.end)
            self.wait(buffers.result)
            self._account(buffers)
        self._num_acquired += 1
        buffers.number = self._num_acquired
        return buffers

    def wait(self, event: Any) -> None:
        """Until the device has passed ``event``. Raises CommunicatorError when a peer was lost meanwhile."""
        wait_for(event, self._groups, STEP_TIMEOUT_SECONDS, self._drop_graphs)

    def drain(self) -> None:
        """Wait for everything in flight."""
        for buffers in self._ring:
            if buffers.in_use:
                self.wait(buffers.end)

    def forget(self) -> None:
        """Wait for everything in flight and count none of it."""
        self.drain()
        for buffers in (*self._ring[self._next :], *self._ring[: self._next]):
            if buffers.in_use:
                self._count(buffers)
            buffers.in_use = False
        self.times, self._num_saturated = DeviceTimes(), 0

    def _account(self, buffers: StepBuffers) -> None:
        import cupy

        self._count(buffers)
        elapsed = cupy.cuda.get_elapsed_time
        following = self._ring[self._next]
        waited = following.follows and following.start.done
        idle_seconds = max(0.0, elapsed(buffers.end, following.start) / 1e3) if waited else 0.0
        self.times += DeviceTimes(elapsed(buffers.start, buffers.end) / 1e3, idle_seconds)

    def _count(self, buffers: StepBuffers) -> None:
        """Take over a step's count, unless a later step's was taken. The device counts modulo 2**32; one step adds less."""
        if buffers.number > self._last_counted:
            found = int(buffers.saturated[0])
            self._num_saturated += (found - self._last_saturated) % (1 << 32)
            self._last_counted, self._last_saturated = buffers.number, found
