# SPDX-License-Identifier: Apache-2.0
"""The HTTP process's view of the engine: submit requests, receive their deltas, know whether it is well."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from phalanx.parallel.errors import CapacityError, CommunicatorError
from phalanx.runtime.request import Request, SamplingParams, TokenDelta
from phalanx.runtime.server.errors import ApiError, invalid, overloaded
from phalanx.runtime.server.link.messages import (
    Cancel,
    Deltas,
    Drained,
    Draining,
    Failed,
    FrameDecoder,
    FromFrontend,
    FrontendReady,
    ModelInfo,
    Refused,
    Stats,
    Stop,
    Submit,
    ToFrontend,
    encode_frame,
)

__all__ = ["EngineClient", "GenerationGroup", "ServerState"]


class ServerState(enum.Enum):
    """Where the server is in its life."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    FAILED = enum.auto()


class GenerationGroup:
    """The engine requests of one HTTP request; their deltas arrive in one queue, marked by index."""

    def __init__(self, client: EngineClient, request_ids: Sequence[str]) -> None:
        self._client = client
        self._request_ids = list(request_ids)
        self._news: list[tuple[int, list[int] | TokenDelta]] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put_token(self, index: int, token_id: int) -> None:
        """A plain next token of one request; called by the client. What nobody fetches takes little memory."""
        if self._news and self._news[-1][0] == index and isinstance(self._news[-1][1], list):
            self._news[-1][1].append(token_id)
        else:
            self._news.append((index, [token_id]))
        self._wake()

    def put(self, index: int, delta: TokenDelta) -> None:
        """Other news of one request; called by the client."""
        self._news.append((index, delta))
        self._wake()

    def fail(self, error: ApiError) -> None:
        """The group cannot go on; called by the client."""
        self._error = self._error or error
        self._wake()

    async def next(self) -> list[tuple[int, TokenDelta]]:
        """Wait for news; everything that has arrived by then.

        Raises:
            ApiError: the engine refused a request of this group, or is gone; what came before was returned earlier.
        """
        if not self._news and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news = self._news, []
        if not news and self._error is not None:
            raise self._error
        return [(index, self._as_delta(index, item)) for index, item in news]

    def cancel(self, index: int) -> None:
        """End one request of the group; no news of it come any more."""
        self._client.cancel(self._request_ids[index])

    def close(self) -> None:
        """End what is still open."""
        for request_id in self._request_ids:
            self._client.cancel(request_id)

    def _as_delta(self, index: int, item: list[int] | TokenDelta) -> TokenDelta:
        return TokenDelta(self._request_ids[index], tuple(item)) if isinstance(item, list) else item

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient(asyncio.Protocol):
    """Runs on the event loop; `load_model` and `on_gone` are what the process does about the engine's news.

    Attributes:
        state: where the server is in its life.
        model: what the engine said about the model, None before it is ready.
        stats: the latest counts, None before the first.
        failure: why the state is FAILED.
    """

    def __init__(
        self,
        load_model: Callable[[ModelInfo], None],
        on_gone: Callable[[], None],
        on_stats: Callable[[Stats], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = ServerState.STARTING
        self.model: ModelInfo | None = None
        self.stats: Stats | None = None
        self.failure: str | None = None
        self._load_model, self._on_gone, self._on_stats, self._clock = load_model, on_gone, on_stats, clock
        self._frames = FrameDecoder()
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self._transport: asyncio.Transport | None = None
        self._open: dict[str, tuple[GenerationGroup, int]] = {}
        self._num_submitted = 0
        self._num_admitted = 0
        self._last_progress = clock()

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
        if self._num_admitted + count > limit:
            message = f"{self._num_admitted} requests are open, at most {limit} may be; try again later"
            raise overloaded(CapacityError(message))
        self._num_admitted += count
        try:
            yield
        finally:
            self._num_admitted -= count
            self._report_drained()

    def submit(
        self, prompts: Sequence[tuple[tuple[int, ...], SamplingParams]], deadline: float | None
    ) -> GenerationGroup:
        """Queue requests; `admit` has made room. The group must be closed."""
        if self.failure is not None:
            raise self.failed()
        ids = [str(self._num_submitted + index) for index in range(len(prompts))]
        self._num_submitted += len(prompts)
        group = GenerationGroup(self, ids)
        first_with: dict[tuple[int, ...], str] = {}
        for index, (request_id, (token_ids, params)) in enumerate(zip(ids, prompts, strict=True)):
            self._open[request_id] = (group, index)
            first = first_with.setdefault(token_ids, request_id)
            fork_from = None if first == request_id else first
            self._send(Submit(Request(request_id, token_ids, params, deadline, fork_from)))
        return group

    def cancel(self, request_id: str) -> None:
        """End a request and forget it; unknown ids pass."""
        if self._open.pop(request_id, None) is not None:
            self._send(Cancel(request_id))

    def serve(self) -> None:
        """From now on requests are answered."""
        if self.state is ServerState.STARTING:
            self.state = ServerState.SERVING
        self._send(FrontendReady())

    def send(self, message: FromFrontend) -> None:
        """Tell the engine's side something."""
        self._send(message)

    def seconds_without_progress(self) -> float:
        """How long no step has finished although there was work, or nothing was heard of the engine at all."""
        return self._clock() - self._last_progress

    def failed(self) -> ApiError:
        """The error that every request gets once the engine is gone."""
        return ApiError(500, f"the engine stopped: {self.failure}", code="engine_failed")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket pair is attached to the loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Some bytes of the engine's messages."""
        try:
            for body in self._frames.feed(data):
                self._take(self._decoder.decode(body))
        except (msgspec.DecodeError, CommunicatorError) as error:
            self._fail(f"its messages are damaged: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Rank 0 is gone."""
        self._transport = None
        self._fail("its process is gone")
        self._on_gone()

    def _take(self, message: ToFrontend) -> None:
        match message:
            case Deltas():
                self._take_deltas(message)
            case Stats():
                self._take_stats(message)
            case Refused():
                self._refuse(message)
            case ModelInfo():
                self.model = message
                self._load_model(message)
            case Draining():
                self.state = ServerState.DRAINING
                self._report_drained()
            case Failed(text):
                self._fail(text)
            case Stop():
                self._on_gone()

    def _take_deltas(self, deltas: Deltas) -> None:
        self._last_progress = self._clock()
        for request_id, token_id in zip(deltas.request_ids, deltas.token_ids, strict=True):
            if (entry := self._open.get(request_id)) is not None:
                entry[0].put_token(entry[1], token_id)
        for delta in deltas.others:
            if (entry := self._open.get(delta.request_id)) is not None:
                if delta.finish_reason is not None:
                    del self._open[delta.request_id]
                entry[0].put(entry[1], delta)

    def _take_stats(self, stats: Stats) -> None:
        if self.stats is None or not stats.has_work or stats.num_steps > self.stats.num_steps:
            self._last_progress = self._clock()
        self.stats = stats
        self._on_stats(stats)

    def _refuse(self, refused: Refused) -> None:
        entry = self._open.pop(refused.request_id, None)
        if entry is None:
            return
        if refused.reason == "capacity":
            entry[0].fail(overloaded(CapacityError(refused.message, refused.retry_after_seconds)))
        else:
            entry[0].fail(invalid(refused.message, refused.param))

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self.state = ServerState.FAILED
        for group, _ in self._open.values():
            group.fail(self.failed())
        self._open.clear()

    def _report_drained(self) -> None:
        if self.state is ServerState.DRAINING and self._num_admitted == 0:
            self._send(Drained())

    def _send(self, message: FromFrontend) -> None:
        if self._transport is not None:
            self._transport.write(encode_frame(message))
