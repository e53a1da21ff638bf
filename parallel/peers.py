# SPDX-License-Identifier: Apache-2.0
"""Which process is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

__all__ = ["Peer", "peer_of"]

_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """A process id and a user id."""

    process: int
    user: int


def peer_of(sock: socket.socket) -> Peer:
    """Ask the kernel who listened, connected or made the pair (unix(7), SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return Peer(process, user)
