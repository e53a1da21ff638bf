# SPDX-License-Identifier: Apache-2.0
"""A leader's loop while it serves: requests from the HTTP processes (or from rank 0) into the engine, deltas back to the one that asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from phalanx.parallel.errors import CapacityError, CheckpointError, CommunicatorError, RequestError
from phalanx.runtime.engine import ReplicaStats
from phalanx.runtime.quantisation import saturation_in_words
from phalanx.runtime.request import Request
from phalanx.runtime.scheduler import DeltaBatch
from phalanx.runtime.server.link.channel import FrontendChannels
from phalanx.runtime.server.link.messages import (
    Alive,
    Cancel,
    Deltas,
    Drained,
    Draining,
    DrainRequest,
    FromFrontend,
    FrontendReady,
    FrontendRefused,
    ModelInfo,
    Refused,
    Stats,
    Submit,
)

__all__ = ["EngineBridge", "ServedEngine"]

_LOG = logging.getLogger("phalanx.serve")

STATS_SECONDS = 0.2
IDLE_SECONDS = 0.1
"""Longest sleep without work: how late a signal to drain may be noticed."""
MAX_UNANSWERED_STATS = 150
"""A process that answers none of so many (30 s or more) no longer serves its clients. Counted, not timed, so that a stopped job
which goes on later does not blame anyone."""


class ServedEngine(Protocol):
    """What the bridge needs of `phalanx.runtime.engine.Engine`, or of a `ReplicaRouter` over several."""

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

    def replica_stats(self) -> list[ReplicaStats]:
        """Counts of every replica for metrics and health."""
        ...


class EngineBridge:
    """Runs the engine for the HTTP processes until told to drain; `request_drain` may be called by a signal handler.

    Args:
        on_drain_request: what to do when an administrator asks for a drain; None = drain.
        num_saturated: how many keys and values the ranks' fp8 caches could not hold so far.
    """

    def __init__(
        self,
        engine: ServedEngine,
        channels: FrontendChannels,
        clock: Callable[[], float] = time.monotonic,
        on_drain_request: Callable[[], None] | None = None,
        num_saturated: Callable[[], int] = lambda: 0,
    ) -> None:
        self._num_saturated, self._has_warned = num_saturated, False
        self._on_drain_request = on_drain_request or self.request_drain
        self._engine = engine
        self._channels = channels
        self._clock = clock
        self._next_stats = clock()
        self._drain_requested = False
        self._draining = False
        self._ready: set[int] = set()
        self._drained: set[int] = set()
        self._num_unanswered = [0] * len(channels)
        self._owners: dict[str, int] = {}

    def request_drain(self) -> None:
        """Answer what is open, refuse what is new, then return from `run`."""
        self._drain_requested = True

    def run(self, model: ModelInfo, on_ready: Callable[[], None]) -> None:
        """Serve. ``on_ready`` is called once requests are answered; returns after a drain.

        Raises:
            CheckpointError: an HTTP process cannot read the tokenizer.
            CommunicatorError: an HTTP process is gone, or does not answer.
        """
        self._channels.send(model)
        while len(self._drained) < len(self._channels):
            idle = not self._engine.has_work
            for process, message in self._channels.receive(IDLE_SECONDS if idle else 0.0):
                self._take(process, message, on_ready)
            self._start_drain()
            self._step()
            self._send_stats()
        while self._engine.has_work:  # of clients that have left; every rank must finish the steps it began
            self._engine.step_batches()

    def _take(self, process: int, message: FromFrontend, on_ready: Callable[[], None]) -> None:
        self._num_unanswered[process] = 0
        match message:
            case Submit(request):
                self._submit(process, request)
            case Cancel(request_id):
                self._engine.cancel(request_id)
            case FrontendReady():
                self._ready.add(process)
                if len(self._ready) == len(self._channels):
                    on_ready()
            case FrontendRefused(text):
                raise CheckpointError(text)
            case Drained():
                self._drained.add(process)
            case DrainRequest():
                self._on_drain_request()
            case Alive():
                pass

    def _submit(self, process: int, request: Request) -> None:
        try:
            self._engine.submit(request)
            self._owners[request.request_id] = process
        except RequestError as error:
            self._channels[process].send(Refused(request.request_id, "request", str(error), error.param, error.code))
        except CapacityError as error:
            self._channels[process].send(
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
            self._channels.send(Draining())

    def _step(self) -> None:
        if not self._engine.has_work:
            return
        batches = [self._by_process(batch) for batch in self._engine.step_batches()]
        for process, news in enumerate(zip(*batches, strict=True)):
            if said := [deltas for deltas in news if deltas.request_ids or deltas.others]:
                self._channels[process].send(*said)

    def _by_process(self, batch: DeltaBatch) -> Sequence[Deltas]:
        """What each process asked for, in the batch's order."""
        owners, parts = self._owners, [Deltas([], [], []) for _ in range(len(self._channels))]
        if len(parts) == 1:
            parts = [Deltas(batch.request_ids.tolist(), batch.token_ids.tolist(), [])]
        else:
            for request_id, token_id in zip(batch.request_ids.tolist(), batch.token_ids.tolist(), strict=True):
                part = parts[owners[request_id]]
                part.request_ids.append(request_id)
                part.token_ids.append(token_id)
        for delta in batch.deltas:
            is_last = delta.finish_reason is not None
            owner = owners.pop(delta.request_id, None) if is_last else owners.get(delta.request_id)
            if owner is not None:
                parts[owner].others.append(delta)
        return parts

    def _send_stats(self) -> None:
        now = self._clock()
        if now < self._next_stats:
            return
        self._next_stats = now + STATS_SECONDS
        count = self._num_saturated()
        if count and not self._has_warned:
            self._has_warned = True
            _LOG.warning("%s", saturation_in_words(count))
        self._channels.send(Stats(self._engine.replica_stats(), count))
        self._check_answers()

    def _check_answers(self) -> None:
        for process in self._ready:
            self._num_unanswered[process] += 1
            if self._num_unanswered[process] > MAX_UNANSWERED_STATS:
                silent = MAX_UNANSWERED_STATS * STATS_SECONDS
                raise CommunicatorError(
                    f"{self._channels[process].name} has not answered for {silent:.0f} s; it is stopped or stuck: see its "
                    "last message above, then start the server again"
                )
