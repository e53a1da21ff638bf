# SPDX-License-Identifier: Apache-2.0
"""A communicator whose collectives show in the rank's stamps."""

from __future__ import annotations

from phalanx.parallel.communicator import Array, Communicator
from phalanx.parallel.liveness.progress import RankProgress

__all__ = ["WatchedCommunicator"]


class WatchedCommunicator:
    """``comm``, and in ``progress`` which collective this rank is in."""

    def __init__(self, comm: Communicator, progress: RankProgress) -> None:
        self._comm, self._progress = comm, progress
        self.rank, self.size = comm.rank, comm.size

    def all_reduce(self, array: Array) -> Array:
        self._enter("all_reduce")
        self._comm.all_reduce(array)
        self._progress.collective = ""
        return array

    def all_gather(self, array: Array) -> Array:
        self._enter("all_gather")
        gathered = self._comm.all_gather(array)
        self._progress.collective = ""
        return gathered

    def broadcast(self, array: Array, root: int = 0) -> Array:
        self._enter("broadcast")
        self._comm.broadcast(array, root)
        self._progress.collective = ""
        return array

    def broadcast_idle(self, array: Array, root: int = 0) -> Array:
        self._enter("broadcast of the plan")
        self._comm.broadcast_idle(array, root)
        self._progress.collective = ""
        return array

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        self._comm.send(array, dest, tag)

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        self._enter("receive")
        self._comm.recv(array, source, tag)
        self._progress.collective = ""
        return array

    def barrier(self) -> None:
        self._enter("barrier")
        self._comm.barrier()
        self._progress.collective = ""

    def split(self, members: range) -> Communicator:
        self._enter("split")
        group = WatchedCommunicator(self._comm.split(members), self._progress)
        self._progress.collective = ""
        return group

    def close(self) -> None:
        self._comm.close()

    def _enter(self, collective: str) -> None:
        self._progress.num_collectives += 1
        self._progress.collective = collective
