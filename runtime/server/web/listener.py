# SPDX-License-Identifier: Apache-2.0
"""The listening socket, and who answers on it before the HTTP process has read its libraries."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading

from phalanx.parallel.errors import ConfigError

__all__ = ["answer_early", "bind", "free_port"]

BACKLOG = 2048
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


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        ConfigError: it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host {host} is not an address of this machine: {error.strerror}; use 127.0.0.1, 0.0.0.0 or one that `ip addr` lists"
            ) from None
        raise ConfigError(
            f"--port {port} on {host} cannot be opened: {error.strerror}; "
            "choose another with --port, or 0 for any free one"
        ) from None
    return listener


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


def answer_early(listener: socket.socket, started: int) -> None:
    """Answer 503 on ``listener``, from a thread, until the writing end of the pipe ``started`` is closed.

    The HTTP process does that once it answers itself. Both arguments are then closed.
    """
    threading.Thread(target=_answer, args=(listener, started), name="early answers", daemon=True).start()


def _answer(listener: socket.socket, started: int) -> None:
    listener.setblocking(False)
    while True:
        readable, _, _ = select.select([listener.fileno(), started], [], [])
        if started in readable:
            break
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            with client:
                _refuse(client)
    listener.close()
    os.close(started)


def _refuse(client: socket.socket) -> None:
    """Read what has come of the request, answer, and stay until the client has the answer."""
    client.settimeout(CLIENT_SECONDS)
    with contextlib.suppress(TimeoutError):
        client.recv(65_536)
    client.sendall(_ANSWER)
    client.shutdown(socket.SHUT_WR)
    client.recv(65_536)
