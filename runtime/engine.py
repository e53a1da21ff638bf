# SPDX-License-Identifier: Apache-2.0
"""The loop that joins scheduler and executor: on the leader `Engine`, on the other ranks `follow`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.liveness.progress import RankProgress
from phalanx.runtime.control import ControlChannel, OrderKind
from phalanx.runtime.executors.base import Executor
from phalanx.runtime.request import Request, TokenDelta
from phalanx.runtime.scheduler import DeltaBatch, Scheduler, SchedulerStats
from phalanx.runtime.step import StepPlan

__all__ = ["Engine", "ReplicaStats", "follow"]

Int32Array = NDArray[np.int32]

_MASK_SECONDS = 0.05
"""How long a step waits for the mask of a guided sequence when there is nothing else to do; requests come in between steps."""


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What one replica of a server reports.

    Attributes:
        num_steps: steps finished since the start.
        has_work: whether steps should be finishing now.
        scheduler: the scheduler's own counts.
        is_lost: a rank of it is gone; the counts are its last.
        steps_in_flight: steps that were in flight when the last one finished, itself included; 0 while idle.
        depth: maximum number of steps in flight: pipeline stages, and one more where the device runs ahead.
    """

    num_steps: int
    has_work: bool
    scheduler: SchedulerStats
    is_lost: bool = False
    steps_in_flight: int = 0
    depth: int = 1

    @property
    def pipeline_occupancy(self) -> float:
        """How full the pipeline is, 0 to 1."""
        return 0.0 if self.is_lost else self.steps_in_flight / self.depth


@dataclass(slots=True)
class Engine:
    """The leader's side of one replica.

    `step` keeps as many steps in flight as the executor takes (pipeline stages, plus one where the device runs ahead) and the
    scheduler plans, then collects the oldest. Requests may be submitted and cancelled between any two steps.

    Attributes:
        progress: told of every step that begins and ends.
        clock: monotonic seconds.
    """

    scheduler: Scheduler
    executor: Executor
    control: ControlChannel
    progress: RankProgress = field(default_factory=RankProgress)
    clock: Callable[[], float] = time.monotonic
    in_flight: int = 0
    num_steps: int = 0
    last_in_flight: int = 0

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, by which `DeltaBatch` knows it.

        Raises:
            RequestError: it can never run here.
            CapacityError: the queue is full.
        """
        return self.scheduler.submit(request, self.clock())

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never run here; it is not queued."""
        self.scheduler.check(request)

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        self.scheduler.cancel(request_id, self.clock())

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` would do anything."""
        return self.in_flight > 0 or self.scheduler.has_work or self.scheduler.has_news

    def step(self) -> list[TokenDelta]:
        """Start what can be started, finish one step, and return what happened to each request."""
        return [delta for batch in self.step_batches() for delta in batch.objects()]

    def step_batches(self) -> list[DeltaBatch]:
        """The same as `step` in columns: for readers of many sequences."""
        self._fill()
        if self.in_flight:
            self.last_in_flight = self.in_flight
            result = self.executor.collect()
            self.in_flight -= 1
            self.progress.end_step(self.in_flight, self.executor.num_saturated)
            self.num_steps += 1
            self.scheduler.apply(result, self.clock())
        else:
            self.scheduler.wait_for_masks(_MASK_SECONDS)
        return self.scheduler.take_batches()

    def _fill(self) -> None:
        while self.in_flight < self.executor.depth:
            plan = self.scheduler.plan(self.clock())
            if plan is None:
                return
            self._start(plan)

    def _start(self, plan: StepPlan) -> None:
        self.progress.begin_step(plan.step_id)
        self.control.send(OrderKind.PLAN, plan.words)
        _execute(self.executor, plan)
        self.in_flight += 1

    def stats(self) -> SchedulerStats:
        """Counts for metrics and health."""
        return self.scheduler.stats()

    def replica_stats(self) -> list[ReplicaStats]:
        """The counts of the only replica that this engine knows."""
        in_flight = self.last_in_flight if self.has_work else 0
        return [
            ReplicaStats(
                self.num_steps,
                self.has_work,
                self.stats(),
                steps_in_flight=in_flight,
                depth=self.executor.depth,
            )
        ]

    def release(self) -> None:
        """End the followers' loops; they return from `follow` and may call it again. *Collective with `follow`.*"""
        self.control.send(OrderKind.STOP)


def follow(control: ControlChannel, executor: Executor, progress: RankProgress) -> None:
    """Every other rank: carry out the leader's orders until it says stop. *Collective with `Engine.release`.*"""

    def execute(words: Int32Array) -> None:
        plan = StepPlan.unpack(words)
        progress.begin_step(plan.step_id)
        _execute(executor, plan)
        progress.end_step(0, executor.num_saturated)

    handlers: dict[OrderKind, Callable[[Int32Array], None]] = {
        OrderKind.PLAN: execute,
    }
    while (order := control.receive()).kind != OrderKind.STOP:
        handlers[order.kind](order.words)


def _execute(executor: Executor, plan: StepPlan) -> None:
    try:
        executor.execute(plan)
    except Exception as error:
        error.add_note(f"in step {plan.step_id}")
        raise
