# SPDX-License-Identifier: Apache-2.0
"""Device memory that the ranks of one host have in each other's address space (CUDA IPC over NVLink or PCIe)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import numpy as np

from phalanx.kernels.all_reduce_sizes import MOST_RANKS
from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.hosts import host_ids

__all__ = ["IpcRuntime", "PeerMemory", "neighbours", "open_peer_memory"]

_IPC_GRANULE = 2 << 20
"""A handle opens the whole piece that the driver cut the allocation from; from this size on, there is only one in it."""

_PATTERN_BYTES = 64 << 10
"""What each rank writes into each piece before the memory is trusted: a page of a GPU."""

_LAZY_PEER_ACCESS = 1
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3


class IpcRuntime(Protocol):
    """The part of ``cupy.cuda.runtime`` that is used here; failures are RuntimeErrors."""

    def malloc(self, size: int) -> int: ...
    def free(self, ptr: int) -> None: ...
    def memset(self, ptr: int, value: int, size: int) -> None: ...
    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None: ...
    def getDevice(self) -> int: ...
    def deviceSynchronize(self) -> None: ...
    def deviceGetPCIBusId(self, device: int) -> str: ...
    def deviceGetByPCIBusId(self, bus_id: str) -> int: ...
    def deviceCanAccessPeer(self, device: int, peer: int) -> int: ...
    def ipcGetMemHandle(self, ptr: int) -> bytes: ...
    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int: ...
    def ipcCloseMemHandle(self, ptr: int) -> None: ...


class PeerMemory:
    """One allocation of every rank, open in every rank. Made by `open_peer_memory`."""

    def __init__(self, host: Communicator, runtime: IpcRuntime) -> None:
        self._host, self._runtime = host, runtime
        self._own = self._num_bytes = self._fill = 0
        self._opened: dict[int, int] = {}

    @property
    def addresses(self) -> tuple[int, ...]:
        """By rank, in this process's address space."""
        return tuple(self._opened.get(rank, self._own) for rank in range(self._host.size))

    def allocate(self, num_bytes: int, fill: int) -> tuple[str, bytes]:
        """This rank's piece, every byte ``fill``, on the current device: the name of that, and a handle to open it by."""
        self._num_bytes, self._fill = -(-num_bytes // _IPC_GRANULE) * _IPC_GRANULE, fill
        self._own = self._runtime.malloc(self._num_bytes)
        self._clear()
        bus_id = self._runtime.deviceGetPCIBusId(self._runtime.getDevice())
        return bus_id, self._runtime.ipcGetMemHandle(self._own)

    def open(self, rank: int, bus_id: str, handle: bytes) -> None:
        """Map another rank's piece. Raises RuntimeError when this GPU cannot reach it."""
        if not _reaches(self._runtime, bus_id):
            raise RuntimeError(f"its GPU cannot reach {bus_id}")
        self._opened[rank] = self._runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS)

    def write_patterns(self) -> None:
        """Copy this rank's pattern into its region of every piece, which all ranks have opened. Waits for the device."""
        offset, pattern = self._host.rank * _PATTERN_BYTES, _pattern(self._host.rank)
        own = self._own + offset
        self._runtime.memcpy(own, pattern.ctypes.data, _PATTERN_BYTES, _HOST_TO_DEVICE)
        for address in self._opened.values():
            self._runtime.memcpy(address + offset, own, _PATTERN_BYTES, _DEVICE_TO_DEVICE)
        self._runtime.deviceSynchronize()

    def check_patterns(self) -> None:
        """Look for every rank's pattern in this rank's piece and clear it again, after all ranks have written.

        Raises RuntimeError when a pattern is not there.
        """
        found = np.empty((self._host.size, _PATTERN_BYTES), np.uint8)
        self._runtime.memcpy(found.ctypes.data, self._own, found.nbytes, _DEVICE_TO_HOST)
        for rank, pattern in enumerate(found):
            if not np.array_equal(pattern, _pattern(rank)):
                raise RuntimeError(f"what rank {rank} writes into its memory does not arrive")
        self._clear()

    def abandon(self) -> None:
        """Unmap the others' pieces without waiting for anybody; for a group whose peers are gone."""
        with ExitStack() as unmappings:  # each is tried, whatever the others raise
            while self._opened:
                _, address = self._opened.popitem()
                unmappings.callback(self._runtime.ipcCloseMemHandle, address)

    def close(self) -> None:
        """Unmap the others' pieces, then free this rank's. Waits for the device. *Collective.*

        A piece that is freed while another process maps it, or is left mapped, can keep processes from ending. A rank whose
        device failed comes to the barrier too, and raises RuntimeError afterwards.
        """
        try:
            self._runtime.deviceSynchronize()
        finally:
            try:
                self.abandon()
            finally:
                self._host.barrier()
                self._free()

    def _free(self) -> None:
        own, self._own = self._own, 0
        if own:
            self._runtime.free(own)

    def _clear(self) -> None:
        self._runtime.memset(self._own, self._fill, self._num_bytes)
        self._runtime.deviceSynchronize()


def open_peer_memory(
    host: Communicator, num_bytes: int, fill: int, runtime: IpcRuntime | None = None
) -> PeerMemory | str:
    """Give every rank ``num_bytes`` on its current device, every byte ``fill``, that all others can address.

    *Collective over* ``host``, which must outlive the memory. Where that cannot be, the reason, which is the same on all
    ranks: too many ranks, several hosts, ``NCCL_P2P_DISABLE=1``, GPUs that do not reach each other, an allocation or a handle
    that fails, or stores that do not arrive, as behind an IOMMU and in some virtual machines, where the driver still
    promises peer access.
    """
    if host.size > MOST_RANKS:
        return f"{host.size} ranks are more than the {MOST_RANKS} that may share memory"
    if len(set(host_ids(host))) > 1:
        return "the ranks are on several hosts"
    if reason := _first_failure(host, _refuse_where_disabled):
        return reason
    if runtime is None:
        from cupy.cuda import runtime as cuda_runtime

        runtime = cuda_runtime
    memory = PeerMemory(host, runtime)
    names: list[tuple[str, bytes]] = []
    reason = _first_failure(host, lambda: names.append(memory.allocate(num_bytes, fill)))
    if not reason:
        bus_ids, handles = gather_bytes(host, names[0][0].encode()), gather_bytes(host, names[0][1])
        reason = (
            _first_failure(host, lambda: _open_all(host.rank, memory, bus_ids, handles))
            or _first_failure(host, memory.write_patterns)
            or _first_failure(host, memory.check_patterns)
        )
    if not reason:
        return memory
    with suppress(RuntimeError):  # a device that failed; the reason tells
        memory.close()
    return reason


def neighbours(world: Communicator) -> range:
    """The ranks around this one that may share memory: consecutive, as tensor-parallel ones are, on one host, few enough.

    *Collective.* Every rank is in one such range, and all in it are told the same.
    """
    hosts, first = host_ids(world), 0
    for rank in range(1, world.size):
        if hosts[rank] != hosts[first] or rank - first == MOST_RANKS:
            if rank > world.rank:
                return range(first, rank)
            first = rank
    return range(first, world.size)


def _refuse_where_disabled() -> None:
    """Operators set this where GPUs promise peer access that does not work; NCCL obeys it too."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        raise RuntimeError("NCCL_P2P_DISABLE is set")


def _open_all(own: int, memory: PeerMemory, bus_ids: list[bytes], handles: list[bytes]) -> None:
    for rank, (bus_id, handle) in enumerate(zip(bus_ids, handles, strict=True)):
        if rank != own:
            memory.open(rank, bus_id.decode(), handle)


def _reaches(runtime: IpcRuntime, bus_id: str) -> bool:
    """Whether the current device can address another's memory; a device that this process does not see may."""
    own = runtime.getDevice()
    try:
        other = runtime.deviceGetByPCIBusId(bus_id)
    except RuntimeError:
        return True
    return other == own or bool(runtime.deviceCanAccessPeer(own, other))


def _first_failure(host: Communicator, attempt: Callable[[], Any]) -> str:
    """What the first rank says whose ``attempt`` raised a RuntimeError; empty where none did.

    *Collective.* Returns when every rank has made its attempt.
    """
    try:
        attempt()
        reason = ""
    except RuntimeError as error:
        reason = f"rank {host.rank} of {host.size}: {' '.join(str(error).split())}"
    return next((text.decode() for text in gather_bytes(host, reason.encode()) if text), "")


def _pattern(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, 256, _PATTERN_BYTES, np.uint8)
