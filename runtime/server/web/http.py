# SPDX-License-Identifier: Apache-2.0
"""HTTP parts that every route uses: bounded bodies, JSON answers, noticing that the client left."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.server.settings import FrontendSettings

__all__ = ["ClientGone", "Connection", "error_response", "json_response", "read_body", "until_disconnect"]

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection; an answer could not be delivered."""


class Connection(Protocol):
    """What applications need of the protocol that serves a connection; they find it as ``scope["state"]["connection"]``.

    Attributes:
        is_lost: whether the connection is closed.
        is_writable: whether the client is there and has read most of what was written.
        num_chunks: of the request's body, as they were sent, so far.
    """

    is_lost: bool
    is_writable: bool

    @property
    def num_chunks(self) -> int: ...

    def write_body(self, data: bytes) -> None:
        """Write a part of the answer's body."""
        ...

    def call_when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever the client has caught up."""
        ...

    def call_when_lost(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the connection closes, and read on, because otherwise that is not noticed."""
        ...


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: ApiError, path: str) -> Response:
    """An error object with its status and headers, in the form of the protocol that owns ``path``."""
    status, body = error.for_path(path)
    return Response(body, status, error.headers, media_type="application/json")


async def read_body(request: Request, settings: FrontendSettings) -> bytes:
    """The whole body, counted as it arrives, and decompressed.

    Raises:
        ApiError: 413 when it is too large or in too many chunks, 408 when it takes too long, 415 when it is compressed in a way
            that is not known, 400 when it cannot be decompressed.
        ClientGone: the connection closed before its end.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > 2 * settings.max_body_bytes:
        raise _too_large(settings)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in _WINDOW_BITS:
        raise ApiError(
            415, f"Content-Encoding {encoding!r} is not supported; use gzip, deflate or none", code="unsupported_encoding",
            headers={"accept-encoding": "gzip, deflate", "connection": "close"},
        )  # fmt: skip
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            body = await _read_chunks(request, settings)
        return body if encoding == "identity" else _decompressed(body, encoding, settings)
    except TimeoutError:
        seconds = f"{settings.body_timeout_seconds:g}"
        headers = {"connection": "close", "x-should-retry": "false"}
        raise ApiError(
            408, f"the body did not arrive within {seconds} s", code="body_timeout", headers=headers
        ) from None


async def _read_chunks(request: Request, settings: FrontendSettings) -> bytes:
    """A body somewhat over the limit is read to its end, so that the client is there to see the refusal."""
    connection: Connection = request.scope["state"]["connection"]
    chunks: list[bytes] = []
    num_bytes = num_messages = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(chunk)
        num_messages += 1
        num_chunks = max(num_messages, connection.num_chunks)
        if max(num_bytes / settings.max_body_bytes, num_chunks / settings.max_body_chunks) > 2:
            break
        if num_bytes <= settings.max_body_bytes and num_chunks <= settings.max_body_chunks:
            chunks.append(chunk)
    if num_bytes > settings.max_body_bytes or num_chunks > settings.max_body_chunks:
        raise _too_large(settings)
    return b"".join(chunks)


_WINDOW_BITS = {"identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 47}


def _decompressed(body: bytes, encoding: str, settings: FrontendSettings) -> bytes:
    """The body as it was before compression; no more of it is made than the limit on bodies allows."""
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        data = stream.decompress(body, settings.max_body_bytes + 1)
    except zlib.error:
        raise invalid(
            f"the body is not valid {encoding}; send it as its Content-Encoding says", code="invalid_encoding"
        ) from None
    if len(data) > settings.max_body_bytes:
        raise _too_large(settings)
    if not stream.eof or stream.unused_data:
        raise invalid(f"the body is not one whole {encoding} stream", code="invalid_encoding")
    return data


def _too_large(settings: FrontendSettings) -> ApiError:
    limits = f"{settings.max_body_bytes} bytes or {settings.max_body_chunks} chunks"
    message = f"the body exceeds {limits}; send a smaller one"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


async def until_disconnect(scope: Scope, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client closes its connection first.

    It runs in the task of the request: two tasks more, of which one waits for the client, would cost a fifth of a short request.

    Raises:
        ClientGone: it did.
    """
    connection: Connection = scope["state"]["connection"]
    if connection.is_lost:
        work.close()
        raise ClientGone
    task = asyncio.current_task()
    assert task is not None
    num_cancels = task.cancelling()
    is_gone = False

    def leave() -> None:
        nonlocal is_gone
        is_gone = True
        task.cancel()

    connection.call_when_lost(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and task.uncancel() <= num_cancels:
            raise ClientGone from None
        raise
    finally:
        connection.call_when_lost(None)
