# SPDX-License-Identifier: Apache-2.0
"""The listening sockets, and who answers on them before the HTTP processes have read their libraries."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Sequence

from phalanx.parallel.errors import ConfigError

__all__ = ["ACCEPTS_PER_TURN", "BACKLOG", "answer_early", "bind", "free_port"]

BACKLOG = 2048
ACCEPTS_PER_TURN = 16
"""Connections that an HTTP process accepts before it does other work; asyncio would accept a whole backlog of them."""
CLIENT_SECONDS = 0.5
"""Longest that one client may hold up the others while the server starts."""

_BODY = (
    b'{"error":{"message":"the server is starting; try again in a moment",'
    b'"type":"server_error","param":null,"code":"unavailable"}}'
)
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """Listen on an address with ``count`` sockets, over which Linux spreads new connections evenly (SO_REUSEPORT, socket(7)).

    One socket that all processes inherit would be simpler, but then the first to wake up accepts all that wait: after a burst
    one process would hold most connections. Systems that do not spread (macOS) give all connections to one of the sockets.

    The first socket takes the port before it allows others, so that a port in use is an error and not shared.

    Raises:
        ConfigError: the address cannot be had.
    """
    listeners: list[socket.socket] = []
    try:
        for number in range(count):
            listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, port if number == 0 else listeners[0].getsockname()[1]))
            if count > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host {host} is not an address of this machine: {error.strerror}; use 127.0.0.1, 0.0.0.0 or one that `ip addr` lists"
            ) from None
        raise ConfigError(
            f"--port {port} on {host} cannot be opened: {error.strerror}; "
            "choose another with --port, or 0 for any free one"
        ) from None
    return listeners


def free_port(host: str, port: int) -> int:
    """``port``, or any free one for 0, which another process can open now.

    Raises:
        ConfigError: it is in use, or not ours to open.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise ConfigError(
            f"--grpc-port {port} on {host} cannot be opened: {reason}; choose another, or 0 for any free one"
        ) from None


def answer_early(listeners: Sequence[socket.socket], started: int, tls: ssl.SSLContext | None = None) -> None:
    """Answer 503 on ``listeners``, from a thread, until every writing end of the pipe ``started`` is closed.

    Each HTTP process closes its own once it answers itself. Listeners and pipe are then closed. With ``tls`` the answer is HTTPS.
    """
    threading.Thread(target=_answer, args=(tuple(listeners), started, tls), name="early answers", daemon=True).start()


def _answer(listeners: Sequence[socket.socket], started: int, tls: ssl.SSLContext | None) -> None:
    by_descriptor = {listener.fileno(): listener for listener in listeners}
    for listener in listeners:
        listener.setblocking(False)
    while True:
        readable, _, _ = select.select([*by_descriptor, started], [], [])
        if started in readable:
            break
        for descriptor in readable:
            with contextlib.suppress(OSError):
                client, _ = by_descriptor[descriptor].accept()
                client.settimeout(CLIENT_SECONDS)
                with client if tls is None else tls.wrap_socket(client, server_side=True) as secured:
                    _refuse(secured)
    for listener in listeners:
        listener.close()
    os.close(started)


def _refuse(client: socket.socket) -> None:
    """Read what has come of the request, answer, and stay until the client has the answer."""
    with contextlib.suppress(TimeoutError):
        client.recv(65_536)
    client.sendall(_ANSWER)
    client.shutdown(socket.SHUT_WR)
    client.recv(65_536)
