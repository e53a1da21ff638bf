# SPDX-License-Identifier: Apache-2.0
"""How ranks of a group talk: one small protocol over host arrays, and its trivial implementation for one rank.

`phalanx.parallel.mpi_comm` implements it over MPI, `phalanx.parallel.thread_comm` over threads of one process (tests).
Device arrays have their own protocol in `phalanx.parallel.nccl_comm`. Nothing here pickles: only typed buffers move.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Communicator", "SelfCommunicator", "broadcast_bytes", "gather_bytes"]

Array = NDArray[Any]


class Communicator(Protocol):
    """A group of ranks. Every method but `send` and `recv` is collective: all ranks call it, in the same order."""

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        ...

    def all_reduce(self, array: Array) -> Array:
        """Sum over ranks, in place; returns ``array``. *Collective.*"""
        ...

    def all_gather(self, array: Array) -> Array:
        """Stack the ranks' equal-shaped arrays: ``[R, *array.shape]``. *Collective.*"""
        ...

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite ``array`` with the root's, in place; returns it. *Collective.*"""
        ...

    def broadcast_idle(self, array: Array, root: int = 0) -> Array:
        """Like `broadcast`, for a receiver that may wait long: it gives the processor away meanwhile. *Collective.*"""
        ...

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Start sending a copy of ``array``; does not wait for the receiver."""
        ...

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Wait for a message and fill ``array`` with it; returns ``array``."""
        ...

    def barrier(self) -> None:
        """Wait for every rank. *Collective.*"""
        ...

    def split(self, members: range) -> Communicator:
        """The sub-group that holds this rank; every rank passes its own group's ranks in this one. *Collective.*"""
        ...

    def close(self) -> None:
        """Release what the group holds. *Collective.*"""
        ...


class SelfCommunicator:
    """A group of one: every operation is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, array: Array) -> Array:
        """Return ``array`` unchanged."""
        return array

    def all_gather(self, array: Array) -> Array:
        """Return ``array[None]``."""
        return np.asarray(array)[None]

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Return ``array`` unchanged."""
        return array

    def broadcast_idle(self, array: Array, root: int = 0) -> Array:
        """Return ``array`` unchanged."""
        return array

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Raise: a group of one has no peer to send to."""
        raise AssertionError("a group of one rank cannot send")

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Raise: a group of one has no peer to receive from."""
        raise AssertionError("a group of one rank cannot receive")

    def barrier(self) -> None:
        """Nothing to wait for."""

    def split(self, members: range) -> SelfCommunicator:
        """The only sub-group is the group itself."""
        return self

    def close(self) -> None:
        """Nothing to release."""


_PIECE_BYTES = 1 << 30
"""MPI 3 counts in 32 bits."""


def broadcast_bytes(comm: Communicator, data: bytes) -> bytes:
    """What rank 0 gives; the others' argument is not looked at. *Collective.*"""
    size = int(comm.broadcast(np.array([len(data)], np.int64))[0])
    whole = np.frombuffer(data, np.uint8).copy() if comm.rank == 0 else np.empty(size, np.uint8)
    for start in range(0, size, _PIECE_BYTES):
        comm.broadcast(whole[start : start + _PIECE_BYTES])
    return whole.tobytes()


def gather_bytes(comm: Communicator, data: bytes) -> list[bytes]:
    """What every rank gives, by rank; lengths may differ. *Collective.*"""
    sizes = comm.all_gather(np.array([len(data)], np.int64))[:, 0].tolist()
    padded = np.frombuffer(data.ljust(max(sizes), b"\0"), np.uint8)
    return [row[:size].tobytes() for row, size in zip(comm.all_gather(padded), sizes, strict=True)]
