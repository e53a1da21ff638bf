# SPDX-License-Identifier: Apache-2.0
"""The HTTP process's view of the engine: submit requests, receive their deltas, know whether it is well."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from phalanx.parallel.errors import CapacityError, CommunicatorError
from phalanx.parallel.peers import peer_of
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.server.board import Room
from phalanx.runtime.server.errors import ApiError, invalid, overloaded, unavailable
from phalanx.runtime.server.link.generation_group import GenerationGroup
from phalanx.runtime.server.link.messages import (
    Alive,
    Cancel,
    Deltas,
    Drained,
    Draining,
    Failed,
    FrameDecoder,
    FromFrontend,
    FrontendReady,
    FrontendRefused,
    Job,
    ModelInfo,
    Phase,
    Pulse,
    Refused,
    Stats,
    Stop,
    Submit,
    ToFrontend,
    Trouble,
    encode_frame,
)

__all__ = ["EngineClient", "EngineLost", "ServerState"]


DELIVERY_SECONDS = 0.002
"""How long readers are told of their tokens before others have the loop: /health must answer under any load."""

REPORT_SECONDS = 2.0
"""How long a rank 0 that has said why it ends may take to end. Until then this process writes nothing, not even that requests have failed:
MPICH's launcher, once a rank has crashed, kills the others at the next output of any process, and would cut off rank 0's report."""

_LOG = logging.getLogger("phalanx.server")


class EngineLost(ApiError):
    """The engine is gone and another one starts: what a client has not seen a part of may be asked again."""


class ServerState(enum.Enum):
    """Where the server is in its life."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    FAILED = enum.auto()


class EngineClient(asyncio.Protocol):
    """Runs on the event loop; `load_model` and `on_gone` are what the process does about the engine's news.

    Args:
        room: the requests that are open in all HTTP processes.
        process: number of this HTTP process; it begins the ids of its requests.
        on_change: under a supervisor, called when requests are answered from now on, a drain has begun, or the engine is lost; None =
            no supervisor, so the process ends with the engine.
        on_quiet: called with True when this process must not write to its standard error for a moment, and with False when it may again.

    Attributes:
        state: where the server is in its life.
        model: what the engine said about the model, None before it is ready.
        stats: the latest counts, None before the first.
        failure: why the state is FAILED.
        job: which of a supervisor's jobs the engine belongs to.
        phase: what rank 0 does before it is ready, in words; empty until it says so.
        trouble: which rank does not answer at the moment; None = all do.
        pulse_at: when rank 0's process was last known to run; None = it has not said so yet, or is gone.
        marked: groups that have something to read; their readers are told soon.
    """

    def __init__(
        self,
        load_model: Callable[[ModelInfo], None],
        on_gone: Callable[[], None],
        on_stats: Callable[[Stats], None],
        room: Room,
        process: int = 0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[ServerState], None] | None = None,
        on_quiet: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._on_change, self._on_quiet = on_change, on_quiet
        self._serving: asyncio.Future[None] | None = None
        self._is_stopped = False
        self._refusal: FrontendRefused | None = None
        self._room, self._process = room, process
        self.state = ServerState.STARTING
        self.model: ModelInfo | None = None
        self._engine_model: ModelInfo | None = None
        self.stats: Stats | None = None
        self.failure: str | None = None
        self.phase, self.job = "", 0
        self.trouble: str | None = None
        self.pulse_at: float | None = None
        self._load_model, self._on_gone, self._on_stats, self._clock = load_model, on_gone, on_stats, clock
        self._frames = FrameDecoder()
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self._transport: asyncio.Transport | None = None
        self._engine_name, self._engine_process = "rank 0", 0
        self._open: dict[str, tuple[GenerationGroup, int]] = {}
        self.marked: deque[GenerationGroup] = deque()
        self._is_delivering = False
        self._is_held = False
        self._quiet: asyncio.TimerHandle | None = None
        self._num_submitted = 0
        self._last_progress = [clock()]

    # For handlers

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Room for ``count`` requests, taken before any costly work is done for them.

        Raises:
            ApiError: 400 when they could never fit together, 429 when they do not fit now.
        """
        assert self.model is not None
        limit = self.model.max_open_requests
        if count > limit:
            raise invalid(f"the request asks for {count} generations; at most {limit} fit at once", "n")
        try:
            self._room.enter(count, limit)
        except CapacityError as error:
            raise overloaded(error) from None
        try:
            yield
        finally:
            self._room.leave(count)
            self._report_drained()

    def submit(
        self,
        prompts: Sequence[tuple[tuple[int, ...], SamplingParams]],
        deadline: float | None,
        num_choices: int = 1,
        cache_salt: str = "",
        priority: int = 0,
    ) -> GenerationGroup:
        """Queue requests, ``num_choices`` in a row for each prompt; `admit` has made room. The group must be closed."""
        if self.failure is not None:
            raise self.failed()
        if self._transport is None:
            raise unavailable(f"the server is starting ({self.phase}); try again in a moment")
        ids = [f"{self._process}-{self._num_submitted + index}" for index in range(len(prompts))]
        self._num_submitted += len(prompts)
        group = GenerationGroup(self, ids)
        first_with: dict[tuple[int, ...], str] = {}
        for index, (request_id, (token_ids, params)) in enumerate(zip(ids, prompts, strict=True)):
            self._open[request_id] = (group, index)
            first = first_with.setdefault(token_ids, request_id)
            if params.beam_width > 1:  # a search gives its answers to the choices of one prompt
                first = ids[index - index % num_choices]
            fork_from = None if first == request_id else first
            followers = num_choices - 1 if params.beam_width > 1 and fork_from is None else 0
            self._send(
                Submit(Request(request_id, token_ids, params, deadline, fork_from, cache_salt, priority, followers))
            )
        return group

    def cancel(self, request_id: str) -> None:
        """End a request and forget it; unknown ids pass."""
        if self._open.pop(request_id, None) is not None:
            self._send(Cancel(request_id))

    @property
    def num_open(self) -> int:
        """Requests that are open in all HTTP processes."""
        return sum(self._room.num_open())

    @property
    def is_connected(self) -> bool:
        """Whether an engine is there whose end has not been noticed."""
        return self._transport is not None

    def disconnect(self) -> None:
        """End the connection to the engine, which then ends; `connection_lost` follows."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_draining(self) -> bool:
        """Whether the server waits for the last answers."""
        return self.state is ServerState.DRAINING

    def still_has(self, model: ModelInfo) -> bool:
        """Whether the engine that sent ``model`` has not been lost since; the next one sends its own."""
        return self._engine_model is model

    def serve(self) -> None:
        """From now on requests are answered."""
        if self.state is ServerState.STARTING:
            self._change(ServerState.SERVING)
        self._send(FrontendReady())

    async def wait_until_serving(self) -> None:
        """Return when another engine has taken the place of the one that was lost.

        Raises:
            ApiError: there will be none.
        """
        while self.state is ServerState.STARTING:
            self._serving = self._serving or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._serving)
        if self.failure is not None:
            raise self.failed()

    def send(self, message: FromFrontend) -> None:
        """Tell the engine's side something."""
        self._send(message)

    def seconds_without_progress(self) -> float:
        """How long no step of some replica has finished although it had work, or nothing was heard of the engine at all."""
        return self._clock() - min(self._last_progress)

    def failed(self) -> ApiError:
        """The error that every request gets once the engine is gone."""
        return ApiError(500, f"the engine stopped: {self.failure}", code="engine_failed")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket pair is attached to the loop, or the next engine has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._engine_process = transport, peer_of(transport.get_extra_info("socket")).process
        self._engine_name = f"rank 0 ({socket.gethostname()}, pid {self._engine_process})"  # as other ranks name it
        self._frames, self._is_held = FrameDecoder(), False
        if self._refusal is not None:
            self._send(self._refusal)
        self.stats, self.trouble, self.pulse_at = None, None, None
        self._last_progress = [self._clock()]

    def data_received(self, data: bytes) -> None:
        """Some bytes of the engine's messages."""
        try:
            for body in self._frames.feed(data):
                self._take(self._decoder.decode(body))
            self._deliver_soon()
        except (msgspec.DecodeError, CommunicatorError) as error:
            self._lose(f"its messages are damaged: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Rank 0 is gone: as it should be, if it has said `Stop` or every answer of a drain was given.

        A message that crosses its end closes the transport at once, and `Stop` is then never read.
        """
        self._transport = self.pulse_at = None
        self._may_write()
        has_ended = self._is_stopped or self._is_drained
        if not has_ended:
            reason = "the launcher may have ended it because another rank was lost"
            self._lose(f"{self._engine_name} has ended without a message; {reason}")
        if self._on_change is None or has_ended:
            self._on_gone()

    def _deliver_soon(self) -> None:
        if self.marked and not self._is_delivering:
            self._is_delivering = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        """Tell readers for a moment, then let others have the loop; the engine's messages wait until all readers were told.

        So tokens that pile up meanwhile go out together, and the loop answers other requests in between.
        """
        marked, now = self.marked, time.monotonic()
        end = now + DELIVERY_SECONDS
        try:
            while marked and now <= end:
                marked.popleft().notify(now)
                now = time.monotonic()
        finally:  # a reader that fails must not keep the others from being told
            self._is_delivering = bool(marked)
            if marked:
                asyncio.get_running_loop().call_soon(self._deliver)
            self._hold_back(bool(marked))

    def _hold_back(self, hold: bool) -> None:
        if self._transport is None or hold == self._is_held:
            return
        self._is_held = hold
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _take(self, message: ToFrontend) -> None:
        match message:
            case Deltas():
                self._take_deltas(message)
            case Stats():
                self._take_stats(message)
            case Refused():
                self._refuse(message)
            case ModelInfo():
                self.model = self._engine_model = message
                self._load_model(message)
            case Draining():
                self._change(ServerState.DRAINING)
                self._report_drained()
            case Job(number):
                self.job = number
            case Phase(text):
                self.phase = text
            case Trouble(text):
                self.trouble = text
            case Pulse():
                self.pulse_at = self._clock()
            case Failed(text):
                self._keep_quiet()
                self._lose(text, is_said=self.state is ServerState.STARTING)
            case Stop():
                self._is_stopped = True
                self._on_gone()

    def _keep_quiet(self) -> None:
        """Rank 0 has said why it ends: let it write its report, until it has ended or takes its time."""
        if self._quiet is None:
            self._on_quiet(True)
            self._quiet = asyncio.get_running_loop().call_later(REPORT_SECONDS, self._may_write)

    def _may_write(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None
            self._on_quiet(False)

    def _take_deltas(self, deltas: Deltas) -> None:
        find = self._open.get
        for request_id, token_id in zip(deltas.request_ids, deltas.token_ids, strict=True):
            if (entry := find(request_id)) is not None:
                group, index = entry
                group.put_token(index, token_id)
        for delta in deltas.others:
            if (entry := self._open.get(delta.request_id)) is not None:
                if delta.finish_reason is not None:
                    del self._open[delta.request_id]
                entry[0].put(entry[1], delta)

    def _take_stats(self, stats: Stats) -> None:
        before, now = self.stats, self._clock()
        if before is None:
            self._last_progress = [now] * len(stats.replicas)
        else:
            for index, (old, new) in enumerate(zip(before.replicas, stats.replicas, strict=True)):
                if new.is_lost or not new.has_work or new.num_steps > old.num_steps:
                    self._last_progress[index] = now
        self.stats = stats
        self._on_stats(stats)
        self._send(Alive())

    def _refuse(self, refused: Refused) -> None:
        entry = self._open.pop(refused.request_id, None)
        if entry is None:
            return
        if refused.reason == "capacity":
            entry[0].fail(overloaded(CapacityError(refused.message, refused.retry_after_seconds)))
        else:
            entry[0].fail(invalid(refused.message, refused.param, refused.code))

    def fail(self, reason: str, is_said: bool = False) -> None:
        """The engine is gone for good: every request gets this reason.

        Args:
            is_said: whether the ranks have printed it, and the server has never been ready: then there is no log to complete.
        """
        if self.failure is None:
            self.failure = reason
            self._change(ServerState.FAILED)
            if not is_said:
                _LOG.error("the engine stopped: %s", reason)
        self._end_groups(self.failed())

    def end_silent_engine(self, seconds: float) -> None:
        """Rank 0's process has been silent for so long: it is ended, which whatever watches it notices."""
        self.pulse_at = None
        self._lose(f"{self._engine_name} has given no sign of life for {seconds:.0f} s; it is stopped or stuck")
        if self._engine_process:  # 0: of another container
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._engine_process, signal.SIGKILL)

    def _lose(self, reason: str, is_said: bool = False) -> None:
        """The engine is gone; under a supervisor, unless it was draining, another one starts."""
        self._engine_model = None
        if self._on_change is None or self.state in (ServerState.DRAINING, ServerState.FAILED):
            self.fail(reason, is_said)
            return
        was_serving = self.state is ServerState.SERVING
        self._change(ServerState.STARTING)
        if was_serving:
            self.phase = f"again, because the engine stopped: {reason}"
            _LOG.error("the engine stopped: %s", reason)
        self._end_groups(EngineLost(500, f"the engine stopped: {reason}", code="engine_failed"))

    def _end_groups(self, error: ApiError) -> None:
        for group, _ in self._open.values():
            group.fail(error)
        self._open.clear()
        self._deliver_soon()

    def _change(self, state: ServerState) -> None:
        self.state = state
        if self._on_change is not None:
            self._on_change(state)
        if state is not ServerState.STARTING and self._serving is not None:
            self._serving.set_result(None)
            self._serving = None

    def _report_drained(self) -> None:
        if self._is_drained:
            self._send(Drained())

    @property
    def _is_drained(self) -> bool:
        return self.state is ServerState.DRAINING and self._room.num_own == 0

    def _send(self, message: FromFrontend) -> None:
        if self._transport is not None:
            self._transport.write(encode_frame(message))
        elif isinstance(message, FrontendRefused):
            self._refusal = message
