# SPDX-License-Identifier: Apache-2.0
"""One connection from every rank of a group to its rank 0, which the kernel closes when a process ends, whatever ended it.

Where one host holds all ranks, rank 0 listens on an abstract Unix socket. Otherwise it listens on TCP until every rank has
connected, a matter of milliseconds, and refuses peers that do not know the token that MPI has broadcast.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.hosts import host_ids

__all__ = ["connect_ranks"]

CONNECT_SECONDS = 10.0
_HELLO = struct.Struct("<16sI")
_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40


def connect_ranks(world: Communicator) -> tuple[dict[int, socket.socket], str | None]:
    """This rank's connections by rank: on rank 0 to all others, elsewhere to rank 0. *Collective.*

    Where some rank cannot reach rank 0 there are no connections at all, and the second value says which.
    """
    if world.size == 1:
        return {}, None
    places = _places(world)
    listener = _listen(set(places)) if world.rank == 0 else None
    token = secrets.token_bytes(16)
    invitation = b"" if listener is None else msgspec.msgpack.encode((token, _names(listener)))
    token, names = msgspec.msgpack.decode(gather_bytes(world, invitation)[0], type=tuple[bytes, list[str]])
    sockets = _join(names, token, world.rank) if listener is None else _accept(listener, token, world.size)
    joined = world.all_gather(np.array([len(sockets)]))[:, 0].tolist()
    missing = [rank for rank in range(1, world.size) if not joined[rank]]
    if not missing and joined[0] == world.size - 1:
        return sockets, None
    for sock in sockets.values():
        sock.close()
    return {}, f"rank {missing[0] if missing else '?'} cannot connect to rank 0 at {', '.join(names)}"


def _places(world: Communicator) -> list[str]:
    """By rank, equal where an abstract Unix socket reaches: the same host and network namespace."""
    namespace = str(os.stat("/proc/self/ns/net").st_ino).encode()
    return [f"{host} {row.decode()}" for host, row in zip(host_ids(world), gather_bytes(world, namespace), strict=True)]


def _listen(places: set[str]) -> socket.socket:
    if len(places) > 1:
        return socket.create_server(("", 0))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0phalanx-" + secrets.token_hex(16))
    listener.listen(128)
    return listener


def _names(listener: socket.socket) -> list[str]:
    """Under which addresses other ranks may try it."""
    name = listener.getsockname()
    if isinstance(name, bytes):
        return [name.decode()]
    return [f"{address}:{name[1]}" for address in _addresses()]


def _accept(listener: socket.socket, token: bytes, size: int) -> dict[int, socket.socket]:
    sockets: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    with listener, contextlib.suppress(TimeoutError):
        while len(sockets) < size - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            sock, _ = listener.accept()
            sock.settimeout(1.0)
            try:
                given, rank = _HELLO.unpack(sock.recv(_HELLO.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                given, rank = b"", 0
            if secrets.compare_digest(given, token) and 0 < rank < size and rank not in sockets:
                sockets[rank] = sock
            else:
                sock.close()
    return sockets


def _join(names: Sequence[str], token: bytes, rank: int) -> dict[int, socket.socket]:
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        for name in names:
            with contextlib.suppress(OSError):
                sock = _open(name, deadline)
                sock.sendall(_HELLO.pack(token, rank))
                return {0: sock}
        time.sleep(0.05)
    return {}


def _open(name: str, deadline: float) -> socket.socket:
    if name.startswith("\0"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(name)
        except OSError:
            sock.close()
            raise
        return sock
    host, port = name.rsplit(":", 1)
    sock = socket.create_connection((host, int(port)), timeout=max(0.01, min(2.0, deadline - time.monotonic())))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces, loopback last (netdevice(7), SIOCGIFCONF)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        buffer = array.array("B", bytes(64 * _IFREQ_BYTES))
        address, length = buffer.buffer_info()
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, struct.pack("iL", length, address))
        size, _ = struct.unpack("iL", answer)
        data = buffer.tobytes()[:size]
    found = [socket.inet_ntoa(data[start + 20 : start + 24]) for start in range(0, size, _IFREQ_BYTES)]
    return sorted(found, key=lambda address: address.startswith("127."))
