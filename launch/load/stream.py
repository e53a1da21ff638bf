# SPDX-License-Identifier: Apache-2.0
"""One streamed request over one connection, read with as little work as an event allows.

A general HTTP client spends more on an event than the server does, so that it would be measured instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from phalanx.launch.load.messages import Answer

__all__ = ["Target", "refusal", "send"]

PATH = "/v1/completions"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0
"""Longest wait for the next part of an answer: as long as OpenAI's own client waits."""
CHECK_SECONDS = 10.0
_WAYS_OUT = {
    401: "give --api-key-file", 403: "give --api-key-file", 404: "give --served-model-name, or another --url",
    429: "use a smaller --max-concurrency", 503: "wait until the server is ready",
}  # fmt: skip


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: ``http(s)://HOST:PORT``.
        key: sent as bearer token; empty = none.
    """

    url: str
    key: str = ""

    def head(self, length: int) -> bytes:
        """The request's head for a body of ``length`` bytes."""
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        path = urlsplit(self.url).path.rstrip("/") + PATH
        return (
            f"POST {path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()


def refusal(status: int, content: bytes) -> str:
    """A server's error in a line, with the way out where we know it."""
    try:
        message = str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        message = content[:200].decode(errors="replace")
    way_out = _WAYS_OUT.get(status, "change --input-len, --output-len or --vocab-size to fit the server's model")
    return f"{status} {' '.join(message.split())}; {way_out}"


async def send(target: Target, body: bytes, on_event: Callable[[], None] = lambda: None) -> Answer:
    """Send a request on a new connection and read its answer to the end. ``on_event`` is called for each event with output."""
    answer = Answer(time.monotonic())
    address = urlsplit(target.url)
    port = address.port or (443 if address.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            transport, protocol = await loop.create_connection(
                lambda: _Reader(answer, on_event), address.hostname or "", port, ssl=address.scheme == "https" or None
            )
    except (OSError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}; look at the server's log"
        return answer
    try:
        transport.write(target.head(len(body)) + body)
        while not protocol.end.done():
            await asyncio.wait((protocol.end,), timeout=CHECK_SECONDS)
            if time.monotonic() - protocol.last_part > SILENCE_SECONDS:
                answer.error = f"nothing came for {SILENCE_SECONDS:.0f} s; look at the server's log"
                break
    finally:
        transport.abort()
    if not answer.arrivals and not answer.error:
        answer.error = "the stream ended without a token; look at the server's log"
    return answer


class _Reader(asyncio.Protocol):
    """Reads one response.

    Attributes:
        end: done when nothing more comes.
        last_part: when something came.
    """

    def __init__(self, answer: Answer, on_event: Callable[[], None]) -> None:
        self._answer, self._on_event = answer, on_event
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_part = time.monotonic()
        self._head: bytes | None = b""
        self._status = 0
        self._length: int | None = None
        self._chunks: _Chunks | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Some bytes of the response."""
        self.last_part = time.monotonic()
        if self._head is not None:
            head, found, data = (self._head + data).partition(b"\r\n\r\n")
            if not found:
                self._head = head
                return
            self._read_head(head)
        if self._chunks is not None:
            data = self._chunks.feed(data)
        if self._length is not None:
            self._length -= len(data)
        self._take(data)
        if self._length == 0 or (self._chunks is not None and self._chunks.is_complete):
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """The server has closed the connection."""
        if not self.end.done():
            is_cut = self._head is not None or self._chunks is not None or bool(self._length)
            if (error is not None or is_cut) and not self._answer.error:
                self._answer.error = "the connection was closed in the middle of the answer; look at the server's log"
            self._finish()

    def _read_head(self, head: bytes) -> None:
        self._head = None
        status, *lines = head.split(b"\r\n")
        self._status = int(status.split(b" ")[1])
        fields = dict(line.lower().split(b":", 1) for line in lines)
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            self._chunks = _Chunks()
        elif b"content-length" in fields:
            self._length = int(fields[b"content-length"])

    def _take(self, data: bytes) -> None:
        """Only CR and LF end a line of an event stream, not U+2028 and the like, which a text may hold."""
        if self._status != 200:
            self._rest += data
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._take_event(line[6:])

    def _take_event(self, line: bytes) -> None:
        try:
            event = _decode(line)
        except msgspec.DecodeError as error:
            self._answer.error = f"{type(error).__name__}: {error}; look at the server's log"
            return
        if event.error is not None:
            message = event.error.get("message") if isinstance(event.error, dict) else None
            self._answer.error = str(message or event.error)
        if event.choices:
            self._answer.arrivals.append(self.last_part)
            self._on_event()
        if event.usage:
            counts = {name: count for name, count in event.usage.items() if isinstance(count, int)}
            self._answer.usage = counts

    def _finish(self) -> None:
        if self._status not in (0, 200):
            self._answer.error = refusal(self._status, self._rest)
        if not self.end.done():
            self.end.set_result(None)
        self._transport.close()


class _Chunks:
    """Takes the framing off a body in chunks (RFC 9112, section 7.1).

    Attributes:
        is_complete: the last chunk has come.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """The parts of the body that are complete with ``data``."""
        data = self._buffer + data
        parts, start = [], 0
        while (line := data.find(b"\r\n", start)) >= 0:
            size = int(data[start:line].partition(b";")[0], 16)
            if size == 0:
                self.is_complete = True
                break
            end = line + 2 + size + 2
            if end > len(data):
                break
            parts.append(data[line + 2 : end - 2])
            start = end
        self._buffer = data[start:]
        return b"".join(parts)
