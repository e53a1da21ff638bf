"""Sharing device memory: all ranks come to the same outcome, and nothing stays behind. The runtime is a fake."""

from __future__ import annotations

import ctypes
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from phalanx.kernels.peer_memory import PeerMemory, neighbours, open_peer_memory
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks

SPACING = 1 << 30  # between addresses of the device


@pytest.fixture(autouse=True)
def peer_access_is_not_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)


class Driver:
    """What the ranks' processes share: allocations, and who maps them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.allocated: dict[int, np.ndarray] = {}
        self.mapped: dict[int, int] = {}
        self.next_address = SPACING

    def new_address(self) -> int:
        with self.lock:
            self.next_address += SPACING
            return self.next_address

    def memory(self, ptr: int, size: int) -> np.ndarray:
        """Bytes of an allocation, by its owner's address or where another process maps it."""
        start, offset = ptr // SPACING * SPACING, ptr % SPACING
        memory = self.allocated[self.mapped.get(start, start)]
        assert offset + size <= len(memory)
        return memory[offset : offset + size]


class Runtime:
    """One process's CUDA runtime; ``fails`` names the call that does not work here.

    After a ``sticky`` failure no other call does, and what the process holds goes only with it.
    """

    def __init__(self, driver: Driver, rank: int, fails: str = "", sticky: bool = False) -> None:
        self._driver, self._rank, self.fails, self._sticky = driver, rank, fails, sticky
        self._is_broken = False

    def _call(self, name: str) -> None:
        if name == self.fails or self._is_broken:
            self._is_broken = self._sticky
            raise RuntimeError(f"cudaError in {name}")

    def malloc(self, size: int) -> int:
        self._call("malloc")
        address = self._driver.new_address()
        self._driver.allocated[address] = np.zeros(size, np.uint8)
        return address

    def free(self, ptr: int) -> None:
        self._call("free")
        assert ptr not in self._driver.mapped.values(), "freed while another process maps it"
        del self._driver.allocated[ptr]

    def memset(self, ptr: int, value: int, size: int) -> None:
        self._driver.memory(ptr, size)[:] = value

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        self._call("memcpy")
        if kind == 1:
            ctypes.memmove(self._driver.memory(dst, size).ctypes.data, src, size)
        elif kind == 2:
            ctypes.memmove(dst, self._driver.memory(src, size).ctypes.data, size)
        elif self.fails != "stores are lost":
            self._driver.memory(dst, size)[:] = self._driver.memory(src, size)

    def getDevice(self) -> int:
        return self._rank

    def deviceSynchronize(self) -> None:
        self._call("deviceSynchronize")

    def deviceGetPCIBusId(self, device: int) -> str:
        return f"0000:{device:02x}:00.0"

    def deviceGetByPCIBusId(self, bus_id: str) -> int:
        self._call("deviceGetByPCIBusId")
        return int(bus_id.split(":")[1], 16)

    def deviceCanAccessPeer(self, device: int, peer: int) -> int:
        return int(self.fails != "deviceCanAccessPeer")

    def ipcGetMemHandle(self, ptr: int) -> bytes:
        self._call("ipcGetMemHandle")
        return ptr.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:
        self._call("ipcOpenMemHandle")
        address = self._driver.new_address()
        self._driver.mapped[address] = int.from_bytes(handle, "little")
        return address

    def ipcCloseMemHandle(self, ptr: int) -> None:
        del self._driver.mapped[ptr]  # where it fails, the context is gone, and what it mapped with it
        self._call("ipcCloseMemHandle")


def open_on(
    num_ranks: int, failing_rank: int = -1, fails: str = "", sticky: bool = False
) -> tuple[Driver, list[object]]:
    """What each rank got, closed again."""
    driver = Driver()

    def rank(comm: Communicator) -> object:
        runtime = Runtime(driver, comm.rank, fails if comm.rank == failing_rank else "", sticky)
        memory = open_peer_memory(comm, 3 << 20, 0xFF, runtime)
        if not isinstance(memory, PeerMemory):
            return memory
        own = memory.addresses[comm.rank]
        np.testing.assert_array_equal(driver.allocated[own], np.full(4 << 20, 0xFF, np.uint8))
        owners = [driver.mapped.get(address, address) for address in memory.addresses]
        memory.close()
        return owners

    return driver, run_ranks(num_ranks, rank)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_every_rank_addresses_every_piece(num_ranks: int) -> None:
    driver, results = open_on(num_ranks)
    assert results == [results[0]] * num_ranks
    assert len(set(results[0])) == num_ranks  # type: ignore[call-overload]
    assert not driver.allocated
    assert not driver.mapped


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("malloc", "rank 2 of 4: cudaError in malloc"),
        ("ipcGetMemHandle", "rank 2 of 4: cudaError in ipcGetMemHandle"),
        ("ipcOpenMemHandle", "rank 2 of 4: cudaError in ipcOpenMemHandle"),
        ("deviceCanAccessPeer", "rank 2 of 4: its GPU cannot reach 0000:00:00.0"),
        ("memcpy", "rank 2 of 4: cudaError in memcpy"),
        ("stores are lost", "rank 0 of 4: what rank 2 writes into its memory does not arrive"),
    ],
)
def test_a_failure_on_one_rank_is_everybodys(fails: str, reason: str) -> None:
    driver, results = open_on(4, 2, fails)
    assert results == [reason] * 4
    assert not driver.allocated
    assert not driver.mapped


def test_a_gpu_that_this_process_does_not_see_may_still_be_reached() -> None:
    assert isinstance(open_on(3, 1, "deviceGetByPCIBusId")[1][0], list)


def test_a_device_that_fails_for_good_is_everybodys_reason_and_keeps_nobody_waiting() -> None:
    driver, results = open_on(4, 2, "memcpy", sticky=True)
    assert results == ["rank 2 of 4: cudaError in memcpy"] * 4
    assert not driver.mapped
    assert len(driver.allocated) == 1, "what the broken process holds"


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("fails", ["deviceSynchronize", "ipcCloseMemHandle", "free"])
def test_closing_on_a_device_that_failed_keeps_nobody_waiting(fails: str, sticky: bool) -> None:
    driver, barriers, freed = Driver(), [0] * 3, [0] * 3

    def rank(comm: Communicator) -> None:
        def barrier() -> None:
            barriers[comm.rank] += 1
            comm.barrier()

        def free(ptr: int) -> None:
            freed[comm.rank] += 1
            Runtime.free(runtime, ptr)

        runtime = Runtime(driver, comm.rank, sticky=sticky)
        memory = open_peer_memory(comm, 1, 0, runtime)
        assert isinstance(memory, PeerMemory)
        memory._host = SimpleNamespace(barrier=barrier)  # type: ignore[assignment]
        runtime.free = free  # type: ignore[method-assign]
        if comm.rank != 1:
            memory.close()
            return
        runtime.fails = fails
        with pytest.raises(RuntimeError, match="cudaError"):
            memory.close()

    run_ranks(3, rank)
    assert (barriers, freed) == ([1] * 3, [1] * 3)
    assert not driver.mapped
    assert len(driver.allocated) == int(sticky or fails == "free"), "what the broken process holds"


@pytest.mark.parametrize(("value", "shares"), [("1", False), ("0", True)])
def test_an_operator_who_disables_peer_access_is_obeyed(
    value: str, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", value)
    driver, results = open_on(2)
    assert isinstance(results[0], list) is shares
    assert shares or results == ["rank 0 of 2: NCCL_P2P_DISABLE is set"] * 2
    assert not driver.allocated


def test_more_ranks_than_one_switch_joins_share_no_memory() -> None:
    assert open_on(9)[1] == ["9 ranks are more than the 8 that may share memory"] * 9


def test_ranks_of_several_hosts_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "phalanx.parallel.hosts._BOOT_ID", SimpleNamespace(read_text=lambda: str(threading.get_ident()))
    )
    driver, results = open_on(2)
    assert results == ["the ranks are on several hosts"] * 2
    assert not driver.allocated


@pytest.mark.parametrize(
    ("hosts", "groups"),
    [
        ("A", ["A"]),
        ("AAAABBBB", ["AAAA", "BBBB"]),
        ("ABBA", ["A", "BB", "A"]),
        ("ABAB", ["A", "B", "A", "B"]),
        ("A" * 19 + "B", ["A" * 8, "A" * 8, "AAA", "B"]),
    ],
)
def test_neighbours_are_consecutive_ranks_of_a_host(
    hosts: str, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = threading.local()
    monkeypatch.setattr("phalanx.parallel.hosts._BOOT_ID", SimpleNamespace(read_text=lambda: thread.host))

    def rank(comm: Communicator) -> range:
        thread.host = hosts[comm.rank]
        return neighbours(comm)

    ends = list(itertools.accumulate(map(len, groups)))
    ranges = [range(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    assert run_ranks(len(hosts), rank) == [members for members in ranges for _ in members]
