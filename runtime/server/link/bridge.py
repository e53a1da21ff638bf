# SPDX-License-Identifier: Apache-2.0
"""Rank 0's loop while it serves: requests from the HTTP process into the engine, deltas back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from phalanx.parallel.errors import CapacityError, CheckpointError, RequestError
from phalanx.runtime.request import Request
from phalanx.runtime.scheduler import DeltaBatch, SchedulerStats
from phalanx.runtime.server.link.channel import FrontendChannel
from phalanx.runtime.server.link.messages import (
    Cancel,
    Deltas,
    Drained,
    Draining,
    FromFrontend,
    FrontendReady,
    FrontendRefused,
    ModelInfo,
    Refused,
    Stats,
    Submit,
)

__all__ = ["EngineBridge", "ServedEngine"]

STATS_SECONDS = 0.2
IDLE_SECONDS = 0.1
"""Longest sleep without work: how late a signal to drain may be noticed."""


class ServedEngine(Protocol):
    """What the bridge needs of `phalanx.runtime.engine.Engine`."""

    @property
    def num_steps(self) -> int:
        """Steps finished since the start."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a call of `step_batches` would do anything."""
        ...

    def submit(self, request: Request) -> object:
        """Queue a request, or raise `RequestError` or `CapacityError`."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        ...

    def step_batches(self) -> list[DeltaBatch]:
        """Finish one step."""
        ...

    def stats(self) -> SchedulerStats:
        """Counts for metrics and health."""
        ...


class EngineBridge:
    """Runs the engine for the HTTP process until told to drain; `request_drain` may be called by a signal handler."""

    def __init__(
        self, engine: ServedEngine, channel: FrontendChannel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._clock = clock
        self._next_stats = clock()
        self._drain_requested = False
        self._draining = False
        self._drained = False

    def request_drain(self) -> None:
        """Answer what is open, refuse what is new, then return from `run`."""
        self._drain_requested = True

    def run(self, model: ModelInfo, on_ready: Callable[[], None]) -> None:
        """Serve. ``on_ready`` is called once requests are answered; returns after a drain.

        Raises:
            CheckpointError: the HTTP process cannot read the tokenizer.
            CommunicatorError: the HTTP process is gone.
        """
        self._channel.send(model)
        while not self._drained:
            idle = not self._engine.has_work
            for message in self._channel.receive(IDLE_SECONDS if idle else 0.0):
                self._take(message, on_ready)
            self._start_drain()
            self._step()
            self._send_stats()
        while self._engine.has_work:  # of clients that have left; every rank must finish the steps it began
            self._engine.step_batches()

    def _take(self, message: FromFrontend, on_ready: Callable[[], None]) -> None:
        match message:
            case Submit(request):
                self._submit(request)
            case Cancel(request_id):
                self._engine.cancel(request_id)
            case FrontendReady():
                on_ready()
            case FrontendRefused(text):
                raise CheckpointError(text)
            case Drained():
                self._drained = True

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except RequestError as error:
            self._channel.send(Refused(request.request_id, "request", str(error), error.param, error.code))
        except CapacityError as error:
            self._channel.send(
                Refused(
                    request.request_id,
                    "capacity",
                    str(error),
                    retry_after_seconds=error.retry_after_seconds,
                )
            )

    def _start_drain(self) -> None:
        if self._drain_requested and not self._draining:
            self._draining = True
            self._channel.send(Draining())

    def _step(self) -> None:
        if not self._engine.has_work:
            return
        for batch in self._engine.step_batches():
            if len(batch.token_ids) or batch.deltas:
                self._channel.send(Deltas(batch.request_ids.tolist(), batch.token_ids.tolist(), batch.deltas))

    def _send_stats(self) -> None:
        now = self._clock()
        if now < self._next_stats:
            return
        self._next_stats = now + STATS_SECONDS
        engine = self._engine
        self._channel.send(Stats(engine.num_steps, engine.has_work, engine.stats()))
