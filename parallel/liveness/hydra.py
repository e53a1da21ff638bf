# SPDX-License-Identifier: Apache-2.0
"""Keeping MPICH's launcher from ending the job before the ranks have said which of them is lost.

Hydra kills all ranks of a host within milliseconds of a death, so the report would be a race. It learns of a death when a
descriptor that it shares with the rank is closed (standard output, standard error, the socket of PMI). Rank 0 therefore
holds copies of those of all other ranks, and rank 1 those of rank 0: the kernel closes them only when the holder ends,
after it has spoken. The price is that a holder must end: one that is stopped would keep Hydra waiting, so the rank that gives
a silent rank up kills it.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Mapping

import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.peers import peer_of

__all__ = ["HeldRanks"]

_PMI_VARIABLE = "PMI_FD"
_HYDRA_VARIABLE = "MPI_LOCALRANKID"
"""Slurm's PMI-2 sets the first of the two as well, but notices ended ranks as their parent."""
_MOST_DESCRIPTORS = 3
_EXCHANGE_SECONDS = 10.0


class HeldRanks:
    """What this rank holds of others, and their processes; nothing under other launchers or across hosts."""

    def __init__(self, descriptors: list[int], processes: Mapping[int, int]) -> None:
        self._descriptors, self._processes = descriptors, processes

    def __bool__(self) -> bool:
        return bool(self._processes)

    @classmethod
    def exchange(cls, world: Communicator, sockets: Mapping[int, socket.socket]) -> HeldRanks:
        """Hand descriptors over the connections between rank 0 and the others. *Collective.*"""
        is_hydra = {_PMI_VARIABLE, _HYDRA_VARIABLE} <= os.environ.keys()
        is_able = is_hydra and all(sock.family == socket.AF_UNIX for sock in sockets.values())
        if not world.all_gather(np.array([is_able and bool(sockets)])).all():
            return cls([], {})
        for rank, sock in sockets.items():
            if world.rank or rank == 1:
                _send(sock)
        held = [held for rank, sock in sockets.items() if world.rank in (0, 1) for held in _receive(sock)]
        return cls(held, {rank: peer_of(sock).process for rank, sock in sockets.items()})

    def release(self) -> None:
        """From now on the launcher notices by itself that a rank has ended."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    def kill(self, rank: int) -> None:
        """End a rank that gives no sign of life; no-op where it is not of this host."""
        if process := self._processes.get(rank):  # 0: one of another container's
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _send(sock: socket.socket) -> None:
    shared = [descriptor for descriptor in (1, 2, int(os.environ[_PMI_VARIABLE])) if _is_open(descriptor)]
    with contextlib.suppress(OSError):
        socket.send_fds(sock, [b"\0"], shared)


def _receive(sock: socket.socket) -> list[int]:
    size, received = array.array("i").itemsize, array.array("i")
    try:
        sock.settimeout(_EXCHANGE_SECONDS)
        _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_LEN(_MOST_DESCRIPTORS * size), socket.MSG_CMSG_CLOEXEC)
    except OSError:  # that rank is lost, which the watch says
        return []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data)
    return received.tolist()


def _is_open(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return True
    return False
