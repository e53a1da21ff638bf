# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP/1.1, with a limit on how long a client may take to send its headers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BoundedH11Protocol", "QuietServer"]


class BoundedH11Protocol(H11Protocol):
    """Closes a connection whose first request is not there in time; uvicorn itself would wait for ever."""

    header_timeout_seconds: ClassVar[float] = 30.0

    @classmethod
    def with_header_timeout(cls, seconds: float) -> type[BoundedH11Protocol]:
        """This class with another limit."""
        return type(cls.__name__, (cls,), {"header_timeout_seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.header_timeout_seconds, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._header_timer.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.close()


class QuietServer(uvicorn.Server):
    """Leaves signals alone, because rank 0 decides when to stop, and says when it has started."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers."""
        yield
