# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP/1.1 with bounds: on silent clients, on clients that do not read, and with direct writing of event streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import urlsplit

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.web.listener import BACKLOG

__all__ = ["BoundedH11Protocol", "ConnectionLimits", "QuietServer"]

PROBE_SECONDS = (0.2, 0.02, 1.0, 5.0)
"""When a client that has closed its sending side is probed, each after the one before; the last again and again. What a client
that has left answers to the first probe is seen at the second."""

STALL_CHECK_SECONDS = 1.0

SHOWN_CHARACTERS = 200
"""Of h11's reason, which repeats a line of the request."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long a client may take.

    Attributes:
        header_seconds: until its first request is there.
        unread_seconds: without reading anything of an answer; asked whenever a client reads too slowly.
    """

    header_seconds: float = 30.0
    unread_seconds: Callable[[], float] = lambda: 30.0


class _CountingConnection(h11.Connection):
    """Counts the chunks of the request's body: uvicorn hands on as one what came together."""

    num_chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self.num_chunks += event.chunk_end
        elif isinstance(event, h11.Request):
            self.num_chunks = 0
        return event


class BoundedH11Protocol(H11Protocol):
    """One connection. Application code finds it as ``scope["state"]["connection"]``.

    * A connection whose first request is not there in time is closed; uvicorn itself would wait.
    * A client that reads nothing for too long is cut off, so that it holds up neither its place nor a drain.
    * A client that closes its sending side still gets its answer; one that has left altogether is found by probes.

    Attributes:
        is_lost: whether the connection is closed.
        is_writable: whether the client is there and has read most of what was written.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    @classmethod
    def with_limits(cls, limits: ConnectionLimits) -> type[BoundedH11Protocol]:
        """This class with other limits."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.is_lost, self.is_writable = False, True
        self.conn = self._counted = _CountingConnection(
            h11.SERVER, self.config.h11_max_incomplete_event_size or 16 << 10
        )
        self.app_state = {**self.app_state, "connection": self}
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._close_if_silent)
        self._stall_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._on_writable: Callable[[], None] | None = None
        self._on_lost: Callable[[], None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._stall_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._on_writable = None
        self.is_lost, self.is_writable = True, False
        super().connection_lost(exc)
        if self._on_lost is not None:
            self._on_lost()
        # They lead back to this object, which would wait for the garbage collector.
        self.app_state, self.scope, self.cycle = {}, None, None  # type: ignore[assignment]

    @property
    def num_chunks(self) -> int:
        """Chunks of the request's body so far."""
        return self._counted.num_chunks

    # Event streams

    def write_body(self, data: bytes) -> None:
        """Write a part of the body of an answer that has no length, as HTTP/1.1 frames it."""
        if self.is_lost:
            return
        if self.scope["http_version"] == "1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.transport.write(data)

    def call_when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever a slow client has caught up."""
        self._on_writable = callback

    def call_when_lost(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the connection closes."""
        self._on_lost = callback
        if callback is not None:
            self.flow.resume_reading()

    # Clients that do not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_writable = False
        if self._stall_timer is None:
            self._check_stall(self.transport.get_write_buffer_size(), 0.0)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.is_writable = True
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self._on_writable is not None:
            self._on_writable()

    def _check_stall(self, unread: int, seconds: float) -> None:
        """Cut the client off once it has read nothing for too long; ``unread`` bytes were left ``seconds`` after it last did."""
        left = self.transport.get_write_buffer_size()
        seconds = 0.0 if left < unread else seconds
        if seconds >= self.limits.unread_seconds():
            self.transport.abort()
            return
        again = seconds + STALL_CHECK_SECONDS
        self._stall_timer = self.loop.call_later(STALL_CHECK_SECONDS, self._check_stall, left, again)

    # Clients that have sent everything, or have left

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while a whole request waits for its answer. asyncio knows no half-closed TLS."""
        if self.transport.get_extra_info("sslcontext") is not None:
            return False
        cycle: Any = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete or self.scope["http_version"] != "1.1":
            return False
        self._probe(0)
        return True

    def _probe(self, number: int) -> None:
        cycle: Any = self.cycle
        if self.transport.is_closing():
            return
        if cycle.response_complete:
            self.transport.close()
            return
        if number:
            if not cycle.response_started:
                self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            elif self._on_writable is not None:
                self.write_body(b":\n\n")
        delay = PROBE_SECONDS[min(number, len(PROBE_SECONDS) - 1)]
        self._probe_timer = self.loop.call_later(delay, self._probe, number + 1)

    # Requests

    def _unsupported_upgrade_warning(self) -> None:
        """A client that offers HTTP/2 (Java's does with every request) or a WebSocket gets HTTP/1.1, as RFC 9110, section 7.8 has it."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP with an error object and h11's reason, unless an answer is under way; close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(sys.exception() or msg)
        self.transport.close()

    def _refuse(self, reason: BaseException | str) -> None:
        method, path = "", ""
        if self.conn.our_state is h11.SEND_RESPONSE:  # the head was read, so the application has the request
            _strip_authority(self.scope)
            method, path = self.scope["method"], self.scope["path"]
            self.cycle.disconnected = True  # its answer would come after this one
            self.cycle.message_event.set()
        hint = reason.error_status_hint if isinstance(reason, h11.RemoteProtocolError) else 400
        message = f"invalid HTTP request: {reason!s:.{SHOWN_CHARACTERS}}"
        status, body = ApiError(hint, message, code="invalid_http").for_path(path)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = [
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase),
            *([] if method == "HEAD" else [h11.Data(data=body)]),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None and not self.scope["path"].startswith("/"):
            _strip_authority(self.scope)

    def _close_if_silent(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.close()


def _strip_authority(scope: Any) -> None:
    """A target in absolute form, as a proxy sends it, names the same route as its path (RFC 9112, section 3.2.2)."""
    target = urlsplit(scope["path"])
    if target.scheme in ("http", "https") and target.netloc:
        scope["path"] = target.path or "/"
        scope["raw_path"] = scope["path"].encode()


class QuietServer(uvicorn.Server):
    """Leaves signals alone, because rank 0 decides when to stop, and says when it has started."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections. Asyncio takes its ``backlog`` for the length of the queue too, which is set again."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers."""
        yield
