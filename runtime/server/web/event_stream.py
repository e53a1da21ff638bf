# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, written to the connection directly, without waking a task for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phalanx.runtime.server.web.http import ClientGone, Connection, until_disconnect

__all__ = ["EventStream", "EventWriter"]

COMMENT_SECONDS = 10.0
"""Longest silence of a stream. Proxies give up after 50 to 60 s without a byte; comments are no events."""

_COMMENT = b": waiting\n\n"


class EventWriter:
    """Writes a stream's events.

    Attributes:
        connection: what they are written to. While it is not writable, keep events back, so that they need less memory.
        is_finished: `finish` or `close` was called.
    """

    def __init__(self, connection: Connection) -> None:
        self.is_finished = False
        self.connection = connection
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.create_future()
        self._is_silent = True
        self._timer = self._loop.call_later(COMMENT_SECONDS, self._break_silence)

    def write(self, data: bytes) -> None:
        """Send one or more whole events now."""
        if data:
            self.connection.write_body(data)
            self._is_silent = False

    def finish(self, data: bytes) -> None:
        """Send the last events."""
        self.write(data)
        self._set_end()

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever a slow client has caught up; None = nothing."""
        self.connection.call_when_writable(callback)

    async def finished(self) -> None:
        """Wait for `finish`."""
        await self._end

    def close(self) -> None:
        """Stop writing comments and calling back."""
        self._timer.cancel()
        self.connection.call_when_writable(None)
        self._set_end()

    def _set_end(self) -> None:
        self.is_finished = True
        if not self._end.done():
            self._end.set_result(None)

    def _break_silence(self) -> None:
        if self._is_silent and self.connection.is_writable:
            self.connection.write_body(_COMMENT)
        self._is_silent = True
        self._timer = self._loop.call_later(COMMENT_SECONDS, self._break_silence)


class EventStream(Response):
    """A stream of events: ``start`` gets the writer once the headers are out, ``close`` is called however the stream ends."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, start: Callable[[EventWriter], None], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._start = start
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events or the client are at their end."""
        connection: Connection = scope["state"]["connection"]
        writer = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            writer = EventWriter(connection)
            self._start(writer)
            await until_disconnect(scope, writer.finished())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            return
        finally:
            if writer is not None:
                writer.close()
            self._close()
