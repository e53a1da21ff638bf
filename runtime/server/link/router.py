# SPDX-License-Identifier: Apache-2.0
"""Several replicas as one engine: rank 0's own, and over links those that other leaders run."""

from __future__ import annotations

import dataclasses
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from phalanx.parallel.errors import CapacityError, CommunicatorError, RequestError
from phalanx.runtime.engine import ReplicaStats
from phalanx.runtime.request import Request, TokenDelta
from phalanx.runtime.scheduler import DeltaBatch
from phalanx.runtime.server.link.bridge import ServedEngine
from phalanx.runtime.server.link.channel import ReplicaChannel
from phalanx.runtime.server.link.messages import (
    Cancel,
    Deltas,
    Drained,
    ModelInfo,
    Refused,
    Stats,
    Submit,
    ToFrontend,
)
from phalanx.runtime.server.link.routing import Routes

__all__ = ["OwnEngine", "RemoteReplica", "ReplicaRouter"]

WATCH_SECONDS = 10.0
"""How long the ranks' watch has to report a lost rank and end this process; it knows more than a closed connection says."""
WAIT_SECONDS = 0.002
"""How long a call of `step_batches` waits for other replicas while this one is idle; also how late a new request may be read."""


class OwnEngine(ServedEngine, Protocol):
    """What the router needs of the engine in its own process."""

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never run here; it is not queued."""
        ...

    def release(self) -> None:
        """End the other ranks' loops. *Collective.*"""
        ...


class RemoteReplica:
    """What rank 0 knows of a replica with another leader.

    Args:
        clock_offset: its leader's monotonic clock less ours, in seconds: deadlines are moved by it.
    """

    def __init__(self, channel: ReplicaChannel, clock_offset: float = 0.0) -> None:
        self.channel = channel
        self.model: ModelInfo | None = None
        self.stats: ReplicaStats | None = None
        self._clock_offset = clock_offset

    def submit(self, request: Request) -> None:
        """Queue a request there; `OwnEngine.check` has let it pass."""
        if request.deadline is not None:
            request = dataclasses.replace(request, deadline=request.deadline + self._clock_offset)
        self.channel.send(Submit(request))

    def receive(self) -> list[DeltaBatch]:
        """What happened to its requests.

        Raises:
            CommunicatorError: its leader is gone.
        """
        batches = (self._take(message) for message in self.channel.read())
        return [batch for batch in batches if batch is not None]

    def _take(self, message: ToFrontend) -> DeltaBatch | None:
        match message:
            case Deltas(request_ids, token_ids, others):
                ids = np.empty(len(request_ids), np.object_)
                ids[:] = request_ids
                return DeltaBatch(ids, token_ids=np.array(token_ids, np.int32), deltas=others)
            case Refused(request_id, _, text):  # all replicas have the same limits, so `check` has seen it before
                return DeltaBatch(deltas=[TokenDelta(request_id, finish_reason="error", error=text)])
            case Stats(replicas):
                (self.stats,) = replicas
            case ModelInfo():
                self.model = message
        return None


class ReplicaRouter:
    """A `ServedEngine` that gives each request to one of the replicas.

    A lost replica's requests end with an error, except those that have not had a token: another replica computes them, and
    their tokens are the same, because these depend on the seed and the position only (a request without a seed draws another one).

    Args:
        own: the engine of replica 0, on this rank.
        others: the rest, from replica 1 on.
        survives_loss: go on when a replica is lost. Otherwise the ranks' watch ends the job.
    """

    def __init__(self, own: OwnEngine, others: Sequence[RemoteReplica], survives_loss: bool) -> None:
        self._survives_loss = survives_loss
        self._own = own
        self._others = dict(enumerate(others, 1))
        self._num_replicas = 1 + len(others)
        self._routes = Routes(self._num_replicas)
        self._without_token: set[str] = set()
        self._losses: deque[tuple[int, str]] = deque()
        self._fetched: list[DeltaBatch] = []
        self._ended: list[TokenDelta] = []
        self._last_stats: dict[int, ReplicaStats] = {}
        self._poll = select.poll()
        for remote in others:
            self._poll.register(remote.channel, select.POLLIN)

    def wait_until_ready(self) -> None:
        """Return when every replica has loaded. The ranks' watch bounds the wait.

        Raises:
            CommunicatorError: one is gone.
        """
        for remote in self._others.values():
            while remote.model is None:
                self._poll.poll(100)
                remote.receive()

    def lose(self, replica: int, reason: str) -> None:
        """A rank of a replica is gone. May be called by any thread; takes effect with the next call of another method."""
        self._losses.append((replica, reason))

    def submit(self, request: Request) -> None:
        """Queue a request on one of the replicas, or raise `RequestError` or `CapacityError`."""
        self._take_losses()
        replica = self._routes.choose(request)
        if replica == 0:
            self._own.submit(request)
        else:
            self._own.check(request)
        self._routes.add(request, replica)
        self._without_token.add(request.request_id)
        if replica:
            self._tell(replica, lambda remote: remote.submit(request))

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        replica = self._routes.replica_of(request_id)
        self._without_token.discard(request_id)
        if replica == 0:
            self._own.cancel(request_id)
        elif replica is not None:
            self._tell(replica, lambda remote: remote.channel.send(Cancel(request_id)))

    @property
    def has_work(self) -> bool:
        """Whether any request is open, or something that happened has not been returned yet."""
        return bool(self._own.has_work or self._fetched or self._ended or self._losses or self._others_work())

    def step_batches(self) -> list[DeltaBatch]:
        """Finish a step of this rank's replica, and fetch what the others have done; waits for a moment if only they have work."""
        self._take_losses()
        batches = self._own.step_batches() if self._own.has_work else []
        self._note(batches)
        self._fetch(0.0 if batches or self._fetched or self._ended else WAIT_SECONDS)
        fetched, self._fetched = self._fetched, []
        ended, self._ended = self._ended, []
        return [*batches, *fetched, DeltaBatch(deltas=ended)]

    def replica_stats(self) -> list[ReplicaStats]:
        """Counts of every replica; of a lost one its last."""
        self._take_losses()
        self._fetch(0.0)
        (own,) = self._own.replica_stats()
        return [own, *map(self._stats_of, range(1, self._num_replicas))]

    def release(self) -> None:
        """End the loops of all other ranks. *Collective with `follow` and with the other leaders' bridges.*"""
        for replica in list(self._others):
            self._tell(replica, lambda remote: remote.channel.send(Drained()))
        self._own.release()

    def _others_work(self) -> bool:
        return any(map(self._routes.has_work, self._others))

    def _fetch(self, timeout_seconds: float) -> None:
        """Take in what other replicas have sent, after waiting for the first of it."""
        is_ready = bool(self._poll.poll(timeout_seconds * 1000))
        for replica, remote in list(self._others.items()):
            if not (is_ready or remote.channel.has_unsent):
                continue
            try:
                remote.channel.flush()
                batches = remote.receive()
            except CommunicatorError as error:
                self._closed(replica, error)
            else:
                self._note(batches)
                self._fetched += batches

    def _tell(self, replica: int, tell: Callable[[RemoteReplica], None]) -> None:
        try:
            tell(self._others[replica])
        except CommunicatorError as error:
            self._closed(replica, error)

    def _closed(self, replica: int, error: CommunicatorError) -> None:
        if not self._survives_loss:
            time.sleep(WATCH_SECONDS)
            raise error
        self._lose(replica, str(error))

    def _note(self, batches: Sequence[DeltaBatch]) -> None:
        """Remember which requests have had a token, or have ended."""
        for batch in batches:
            if self._without_token:
                self._without_token.difference_update(batch.request_ids.tolist())
            for delta in batch.deltas:
                self._without_token.discard(delta.request_id)
                if delta.finish_reason is not None:
                    self._routes.end(delta.request_id)

    def _take_losses(self) -> None:
        while self._losses:
            self._lose(*self._losses.popleft())

    def _lose(self, replica: int, reason: str) -> None:
        remote = self._others.pop(replica, None)
        if remote is None:
            return
        self._last_stats[replica] = dataclasses.replace(self._stats_of(replica, remote), is_lost=True)
        self._poll.unregister(remote.channel)
        remote.channel.close()
        for request in self._routes.lose(replica):
            if request.request_id in self._without_token:
                self._submit_again(request)
            else:
                self._end(request, f"replica {replica} was lost while it generated ({reason}); send the request again")

    def _submit_again(self, request: Request) -> None:
        try:
            self.submit(request)
        except (RequestError, CapacityError) as error:
            self._end(request, str(error))

    def _end(self, request: Request, error: str) -> None:
        self._ended.append(TokenDelta(request.request_id, finish_reason="error", error=error))

    def _stats_of(self, replica: int, remote: RemoteReplica | None = None) -> ReplicaStats:
        remote = remote or self._others.get(replica)
        if remote is None:
            return self._last_stats[replica]
        if remote.stats is None:  # its first report is on its way
            (own,) = self._own.replica_stats()
            return dataclasses.replace(own, has_work=False, num_steps=0)
        return dataclasses.replace(remote.stats, has_work=self._routes.has_work(replica))
