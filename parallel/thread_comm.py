# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process: the communicator protocol for tests and for interpreters, without MPI."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from phalanx.parallel.communicator import Array, Communicator
from phalanx.parallel.errors import CommunicatorError

__all__ = ["ThreadCommunicator", "run_ranks"]

Result = TypeVar("Result")
TIMEOUT_SECONDS = 60.0


class _Group:
    """What the threads of one group share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self.slots: list[Array | None] = [None] * size
        self.mailboxes: dict[tuple[int, int, int], queue.SimpleQueue[Array]] = {}
        self.subgroups: dict[tuple[int, ...], _Group] = {}
        self.lock = threading.Lock()
        self.failed = threading.Event()

    def mailbox(self, source: int, dest: int, tag: int) -> queue.SimpleQueue[Array]:
        with self.lock:
            return self.mailboxes.setdefault((source, dest, tag), queue.SimpleQueue())

    def subgroup(self, members: range) -> _Group:
        with self.lock:
            return self.subgroups.setdefault(tuple(members), _Group(len(members)))

    def abort(self) -> None:
        self.failed.set()
        self.barrier.abort()
        for group in self.subgroups.values():
            group.abort()


class ThreadCommunicator:
    """One thread's view of its group."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_gather(self, array: Array) -> Array:
        """Stack the ranks' equal-shaped arrays. *Collective.*"""
        self._group.slots[self.rank] = np.array(array)
        self.barrier()
        gathered = np.stack([slot for slot in self._group.slots if slot is not None])
        self.barrier()
        return gathered

    def all_reduce(self, array: Array) -> Array:
        """Sum over ranks in rank order, in place. *Collective.*"""
        array[...] = self.all_gather(array).sum(axis=0, dtype=array.dtype)
        return array

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite ``array`` with the root's, in place. *Collective.*"""
        if self.rank == root:
            self._group.slots[root] = np.array(array)
        self.barrier()
        value = self._group.slots[root]
        assert value is not None
        array[...] = value
        self.barrier()
        return array

    def broadcast_idle(self, array: Array, root: int = 0) -> Array:
        """The same as `broadcast`: a waiting thread costs nothing. *Collective.*"""
        return self.broadcast(array, root)

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Leave a copy of ``array`` for ``dest``."""
        self._group.mailbox(self.rank, dest, tag).put(np.array(array))

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Wait for a message and fill ``array`` with it."""
        mailbox = self._group.mailbox(source, self.rank, tag)
        waited = 0.0
        while True:
            try:
                array[...] = mailbox.get(timeout=0.1)
                return array
            except queue.Empty:
                waited += 0.1
                if self._group.failed.is_set() or waited > TIMEOUT_SECONDS:
                    raise CommunicatorError(f"rank {self.rank} timed out waiting for rank {source}") from None

    def barrier(self) -> None:
        """Wait for every rank. *Collective.*"""
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError:
            raise CommunicatorError(f"rank {self.rank}: another rank of the group failed") from None

    def split(self, members: range) -> Communicator:
        """The sub-group that holds this rank. *Collective.*"""
        return ThreadCommunicator(self._group.subgroup(members), members.index(self.rank))

    def close(self) -> None:
        """Nothing to release."""


def run_ranks(size: int, body: Callable[[Communicator], Result]) -> list[Result]:
    """Run ``body`` on ``size`` ranks, each a thread; returns their results in rank order.

    The first rank's exception ends the others and is raised.
    """
    group = _Group(size)

    def run(rank: int) -> Result:
        try:
            return body(ThreadCommunicator(group, rank))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, CommunicatorError)):
        raise error
    return [future.result() for future in futures]
