# SPDX-License-Identifier: Apache-2.0
"""The communicator protocol over MPI, on a duplicated communicator, with buffer methods only.

MPI is imported when the first communicator is made, so that commands that need no ranks start without it. One thread per
rank calls MPI.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.parallel.communicator import Array, Communicator, SelfCommunicator
from phalanx.parallel.errors import CommunicatorError, ConfigError
from phalanx.parallel.launcher import LaunchInfo, launch_info
from phalanx.parallel.mpi_start import ULFM_VARIABLE, waiting_for_all_ranks

__all__ = [
    "MpiCommunicator",
    "MpiLibrary",
    "abort_world",
    "all_ranks_failed",
    "mpi_is_up",
    "mpi_library",
    "survives_lost_ranks",
    "world_communicator",
]

_SPIN_SECONDS = 0.001
_SLEEP_SECONDS = (0.0002, 0.002)
"""How an idle rank waits: first yielding, then sleeping in growing steps. 2 ms keeps it near 1 % of a core."""
_MPICH_SEGMENT = "/dev/shm/mpich_shm_"
_YIELD_VARIABLES = ("MPIR_CVAR_ENABLE_HEAVY_YIELD", "OMPI_MCA_mpi_yield_when_idle")
"""Of MPICH and Open MPI."""
_FAILED_TAG = 4711
"""Of messages on the world communicator itself; everything else goes over duplicates of it."""
_MPICH_FAMILY = ("MPICH", "MPICH2", "MVAPICH", "MVAPICH2", "Intel MPI")


class MpiCommunicator:
    """A group of MPI ranks. Owns its communicator; `close` frees it."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._pending: list[tuple[Any, Array]] = []
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def all_reduce(self, array: Array) -> Array:
        """Sum over ranks, in place. *Collective.*"""
        if self.size > 1:
            self._comm.Allreduce(_mpi().IN_PLACE, array)
        return array

    def all_gather(self, array: Array) -> Array:
        """Stack the ranks' equal-shaped arrays: ``[R, *array.shape]``. *Collective.*"""
        array = np.ascontiguousarray(array)
        gathered = np.empty((self.size, *array.shape), array.dtype)
        # The receive count is that of one rank, not of the whole buffer.
        self._comm.Allgather(_bytes(array), [gathered, array.nbytes, _mpi().BYTE])
        return gathered

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite ``array`` with the root's, in place. *Collective.*"""
        self._comm.Bcast(_bytes(array), root)
        return array

    def broadcast_idle(self, array: Array, root: int = 0) -> Array:
        """Like `broadcast`, for a receiver that may wait long: it gives the processor away meanwhile. *Collective.*"""
        request = self._comm.Ibcast(_bytes(array), root)
        deadline = time.monotonic() + _SPIN_SECONDS
        sleep, longest = _SLEEP_SECONDS
        while not request.Test():
            if time.monotonic() < deadline:
                os.sched_yield()
            else:
                time.sleep(sleep)
                sleep = min(sleep * 1.5, longest)
        return array

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Start sending a copy of ``array``; does not wait for the receiver."""
        self._pending = [entry for entry in self._pending if not entry[0].Test()]
        copy = np.array(array, order="C")
        self._pending.append((self._comm.Isend(_bytes(copy), dest, tag), copy))

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Wait for a message and fill ``array`` with it."""
        self._comm.Recv(_bytes(array), source, tag)
        return array

    def barrier(self) -> None:
        """Wait for every rank. *Collective.*"""
        self._comm.Barrier()

    def split(self, members: range) -> Communicator:
        """The sub-group that holds this rank; every rank passes its own group's members. *Collective.*"""
        color, key = members.start, members.index(self.rank)
        return MpiCommunicator(self._comm.Split(color, key))

    def close(self) -> None:
        """Finish sends and free the communicator. *Collective.*"""
        for request, _ in self._pending:
            request.Wait()
        self._pending.clear()
        self._comm.Free()


def world_communicator() -> Communicator:
    """All ranks of this job: over MPI when a launcher started us, else a group of one.

    Raises:
        ConfigError: no MPI library can be loaded, or the launcher and MPI disagree about the number of ranks.
    """
    info = launch_info()
    if info.launcher is None:
        return SelfCommunicator()
    world = _mpi().COMM_WORLD
    if world.Get_size() == 1 and info.size > 1:
        raise ConfigError(_mismatch(info, "MPI sees 1"))
    if world.Get_size() == 1:
        return SelfCommunicator()
    own = world.Dup()
    _unlink_shared_memory(own)  # a script may have started MPI itself
    return MpiCommunicator(own)


def _unlink_shared_memory(world: Any) -> None:
    """Have the kernel remove MPICH's segments with the last rank: a job that is killed would leave them in /dev/shm. *Collective.*"""
    world.Barrier()  # every rank has mapped the shared memory of its host
    for path in _mapped_files():
        if path.startswith(_MPICH_SEGMENT):
            with contextlib.suppress(OSError):
                os.unlink(path)


@dataclass(frozen=True, slots=True)
class MpiLibrary:
    """Which MPI a process has loaded.

    Attributes:
        vendor: name and version, such as ``MPICH 5.0.2``.
        standard: version of the MPI standard, such as ``4.1``.
        path: the library's file, whose ``.so`` number is the ABI (12 MPICH, 40 Open MPI).
    """

    vendor: str
    standard: str
    path: str


def mpi_library() -> MpiLibrary:
    """The MPI library that this process uses, loaded if need be but not started.

    Raises:
        ConfigError: no MPI library can be loaded.
    """
    mpi = _mpi(start=False)
    name, version = mpi.get_vendor()
    return MpiLibrary(
        vendor=f"{name} {'.'.join(map(str, version))}",
        standard=".".join(map(str, mpi.Get_version())),
        path=next((path for path in _mapped_files() if "/libmpi" in path), "not found"),
    )


def _mapped_files() -> set[str]:
    with open("/proc/self/maps") as maps:
        return {line.split(maxsplit=5)[5].rstrip() for line in maps if "/" in line}


def abort_world(status: int) -> None:
    """End every rank of the job at once with ``status``. Returns only in a process that is not one of several ranks."""
    if _join():
        _mpi().COMM_WORLD.Abort(status)


def all_ranks_failed(timeout_seconds: float = 2.0) -> bool:
    """Whether every rank of the job calls this within the timeout. *Collective if it can be.*

    A mistake that all ranks find by themselves (a wrong layout) needs no abort, with its noise from the launcher; one that only
    this rank found does.
    """
    if not _join():
        return True
    world = _mpi().COMM_WORLD
    others = [rank for rank in range(world.Get_size()) if rank != world.Get_rank()]
    # Messages of their own, not a collective: it could be matched with one that the other ranks are in.
    heard = np.zeros(world.Get_size(), np.uint8)
    requests = [world.Irecv([heard[rank : rank + 1], 1, _mpi().BYTE], rank, _FAILED_TAG) for rank in others]
    requests += [world.Isend([np.ones(1, np.uint8), 1, _mpi().BYTE], rank, _FAILED_TAG) for rank in others]
    deadline = time.monotonic() + timeout_seconds
    while not _mpi().Request.Testall(requests):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _join() -> bool:
    """Whether other ranks can be told anything. Starts MPI for that: a rank that left before would be waited for."""
    if mpi_is_up():
        return True
    if launch_info().size == 1 or _mpi_is_finished():
        return False
    try:
        return bool(_mpi().COMM_WORLD.Get_size() > 1)
    except ConfigError:  # no MPI library, or another launcher's: then no rank has started MPI
        return False


def survives_lost_ranks() -> bool:
    """Whether a rank may end without the others: Open MPI under ``mpirun --with-ft ulfm`` (User-Level Failure Mitigation)."""
    return os.environ.get(ULFM_VARIABLE) == "1"


def mpi_is_up() -> bool:
    """Whether this process has started MPI and not finished it."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized() and not module.Is_finalized()


def _mpi_is_finished() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and bool(module.Is_finalized())


def _bytes(array: Array) -> list[Any]:
    if not array.flags.c_contiguous:
        raise CommunicatorError(f"an array of shape {array.shape} is not contiguous; copy it first")
    return [array, array.nbytes, _mpi().BYTE]


def _mpi(start: bool = True) -> Any:
    """``mpi4py.MPI``, initialised on first use.

    Starting under a foreign launcher would end the process from inside MPI, so that is looked at first.
    """
    import mpi4py

    # With a rank lost, Open MPI's MPI_Finalize sometimes waits for it forever; under ULFM its launcher does without.
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, not survives_lost_ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}); install one: pip install mpich, "
            "or load your site's MPI module"
        ) from error
    if start and not MPI.Is_initialized():
        info = launch_info()
        vendor, version = MPI.get_vendor()
        _refuse_foreign_launcher(info, vendor, version)
        _yield_where_ranks_share_cores(info)
        with (
            waiting_for_all_ranks(info, vendor in _MPICH_FAMILY),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),
        ):
            # mpi4py suspects a foreign launcher from the environment alone; `world_communicator` knows by the size.
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
            _unlink_shared_memory(MPI.COMM_WORLD)
    return MPI


def _yield_where_ranks_share_cores(info: LaunchInfo) -> None:
    """Have ranks that wait leave the processor to others.

    MPICH's sleep then: after the sched_yield of its default Linux may well go on with the rank that waits. Open MPI's mpirun does
    this by itself, srun does not.
    """
    if info.local_size > (os.cpu_count() or 1):
        for name in _YIELD_VARIABLES:
            os.environ.setdefault(name, "1")


def _refuse_foreign_launcher(info: LaunchInfo, vendor: str, version: tuple[int, int, int]) -> None:
    """Refuse what would end inside MPI's start with its own words, or as many jobs of one rank as there are ranks."""
    if info.launcher == "Open MPI" and vendor in _MPICH_FAMILY:
        raise ConfigError(_mismatch(info, f"the MPI library is {vendor}"))
    # Open MPI joins ranks over PMIx; only releases before 5 could be built for PMI-2 as well.
    has_no_pmi = info.launcher == "Slurm" or (info.launcher == "MPICH" and version[0] >= 5)
    if vendor == "Open MPI" and info.size > 1 and has_no_pmi:
        raise ConfigError(_mismatch(info, f"the MPI library is Open MPI {version[0]}, which needs PMIx"))


def _mismatch(info: LaunchInfo, what: str) -> str:
    return (
        f"{info.launcher} started {info.size} ranks but {what}: the launcher and the MPI library do not belong "
        "together; use the mpirun of this environment, or srun --mpi=pmix (Open MPI) / --mpi=pmi2 (MPICH)"
    )
