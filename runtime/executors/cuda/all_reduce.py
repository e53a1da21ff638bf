# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel group's all-reduce: our own kernels where the ranks reach each other's memory, else NCCL."""

from __future__ import annotations

import numpy as np

from phalanx.kernels import all_reduce
from phalanx.kernels.all_reduce import ABSENT_BYTE, Exchange
from phalanx.kernels.all_reduce_sizes import exchange_bytes
from phalanx.kernels.arrays import VECTOR_BYTES
from phalanx.kernels.library import Library
from phalanx.kernels.peer_memory import PeerMemory, open_peer_memory
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.nccl_comm import DeviceArray, NcclCommunicator
from phalanx.runtime.executors.cuda.memory import pinned_array

__all__ = ["PeerAllReduce", "PeerCommunicator", "open_peer_all_reduce"]


class PeerAllReduce:
    """Sums short messages through memory that the ranks of one host share. Calls must not overlap on the device.

    A kernel waits for its peers' on the device; `abort` ends it when they do not come.
    """

    def __init__(self, library: Library, memory: PeerMemory, rank: int, num_bytes: int) -> None:
        import cupy

        self._library, self._memory = library, memory
        self._abort_word = pinned_array((1,), np.uint32)
        self._abort_word[0] = 0
        state = cupy.zeros(2, np.uint32)
        cupy.cuda.get_current_stream().synchronize()
        capacity = num_bytes // (2 * VECTOR_BYTES)
        self.exchange = Exchange(rank, memory.addresses, capacity, state, self._abort_word.ctypes.data)

    def fits(self, array: DeviceArray) -> bool:
        """Whether ``array`` can be summed here. The same on all ranks."""
        return all_reduce.fits(array, self.exchange)

    def __call__(self, array: DeviceArray) -> None:
        """Sum over ranks, in place. *Collective.* Enqueues on the current stream; does not wait."""
        all_reduce.all_reduce(self._library, array, self.exchange)

    def abort(self) -> None:
        """End the kernels that wait; what they leave is of no use, and neither is the group."""
        self._abort_word[0] = 1

    def close(self) -> None:
        """Release the shared memory when everything enqueued is done. *Collective*, but not after `abort`."""
        if self._abort_word[0]:
            self._memory.abandon()
        else:
            self._memory.close()


def open_peer_all_reduce(library: Library, host: Communicator) -> PeerAllReduce | str:
    """On the current device; or why not, the same on all ranks. *Collective over* ``host``, which must outlive it."""
    num_bytes = exchange_bytes(host.size)
    memory = open_peer_memory(host, num_bytes, ABSENT_BYTE)
    return memory if isinstance(memory, str) else PeerAllReduce(library, memory, host.rank, num_bytes)


class PeerCommunicator(NcclCommunicator):
    """`NcclCommunicator` whose all-reduce goes through shared memory where the ranks have that and the message fits.

    Owns ``host``.
    """

    def __init__(self, library: Library, host: Communicator) -> None:
        super().__init__(host)
        self._host = host
        peers = open_peer_all_reduce(library, host)
        self._peers = None if isinstance(peers, str) else peers

    def all_reduce(self, array: DeviceArray) -> DeviceArray:
        """Sum over ranks, in place. *Collective.*"""
        if self._peers is None or not self._peers.fits(array):
            return super().all_reduce(array)
        self._peers(array)
        return array

    def abort(self) -> None:
        """End what is in flight without its peers."""
        if self._peers is not None:
            self._peers.abort()
        super().abort()

    def close(self) -> None:
        """Release the group. *Collective*, but not after `abort`."""
        was_open = self._is_open
        try:
            if self._peers is not None:
                self._peers.close()
        finally:
            super().close()
            if was_open:
                self._host.close()
