# SPDX-License-Identifier: Apache-2.0
"""Device arrays between ranks: NCCL communicators made over a host communicator.

Everything is enqueued on the current CuPy stream and can be captured in a CUDA graph. NCCL reports a lost peer or link
asynchronously, so code that waits for the device polls `NcclCommunicator.check` meanwhile; a collective that can no
longer finish is ended by `abort`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CommunicatorError, ConfigError

__all__ = [
    "DeviceArray",
    "DeviceCommunicator",
    "NcclCommunicator",
    "SelfDeviceCommunicator",
    "nccl_version",
    "open_device_group",
    "wait_for",
]

DeviceArray = Any
"""A C-contiguous ``cupy.ndarray``."""

_ID_BYTES = 128
_SPIN_SECONDS = 0.002
_SLEEP_SECONDS = 0.00005
_CHECK_SECONDS = 0.1
_STANDARD_ERROR = 2
_ABORT_SECONDS = 10.0
"""A process that cannot abort its groups in this time is ended, with the stacks of its threads on standard error."""


class DeviceCommunicator(Protocol):
    """A group of ranks with one GPU each. Every method but `send` and `recv` is collective."""

    rank: int
    size: int

    @property
    def handle(self) -> int:
        """Address of the ``ncclComm_t``, for a library that calls NCCL itself (TensorRT); 0 = there is none."""
        ...

    def all_reduce(self, array: DeviceArray) -> DeviceArray:
        """Sum over ranks, in place; returns ``array``. *Collective.* Enqueues on the current stream; does not wait."""
        ...

    def all_gather(self, array: DeviceArray, out: DeviceArray) -> DeviceArray:
        """Stack the ranks' arrays in ``out`` ``[R, *array.shape]``. *Collective.* Enqueues; does not wait."""
        ...

    def send(self, array: DeviceArray, dest: int) -> None:
        """Give ``array`` to ``dest``. Enqueues; the stream goes on when it has left or is buffered."""
        ...

    def recv(self, array: DeviceArray, source: int) -> DeviceArray:
        """Fill ``array`` from ``source``; returns it. Enqueues; the stream waits for the data, the host does not."""
        ...

    def check(self) -> None:
        """Raise `CommunicatorError` if a peer or a link was lost since."""
        ...

    def abort(self) -> None:
        """End what is in flight without its peers; the group is of no use afterwards."""
        ...

    def close(self) -> None:
        """Release the group when everything enqueued is done. *Collective*, but not after `abort`."""
        ...


class SelfDeviceCommunicator:
    """A group of one: nothing to do."""

    rank = 0
    size = 1
    handle = 0

    def all_reduce(self, array: DeviceArray) -> DeviceArray:
        """Return ``array`` unchanged."""
        return array

    def all_gather(self, array: DeviceArray, out: DeviceArray) -> DeviceArray:
        """Return ``array[None]``; ``out`` stays as it is."""
        return array[None]

    def send(self, array: DeviceArray, dest: int) -> None:
        """Raise: a group of one has no peer to send to."""
        raise AssertionError("a group of one rank cannot send")

    def recv(self, array: DeviceArray, source: int) -> DeviceArray:
        """Raise: a group of one has no peer to receive from."""
        raise AssertionError("a group of one rank cannot receive")

    def check(self) -> None:
        """Nothing can be lost."""

    def abort(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing to release."""


class NcclCommunicator:
    """A device group over NCCL.

    Construction is collective over ``host``: its rank 0 makes NCCL's identifier and broadcasts it, so no port is
    opened.

    Raises:
        ConfigError: NCCL cannot be loaded.
        CommunicatorError: the ranks cannot reach each other.
    """

    def __init__(self, host: Communicator) -> None:
        nccl = _nccl()
        self._nccl, self._is_open = nccl, True
        self.rank, self.size = host.rank, host.size
        identifier = np.zeros(_ID_BYTES, np.uint8)
        if host.rank == 0:
            identifier[:] = np.frombuffer(nccl.get_unique_id(), np.uint8)
        host.broadcast(identifier)
        try:
            self._comm = nccl.NcclCommunicator(host.size, identifier.tobytes(), host.rank)
        except nccl.NcclError as error:
            raise CommunicatorError(
                f"NCCL cannot join rank {host.rank} of {host.size} ({error}); run phalanx doctor, or set NCCL_DEBUG=WARN"
            ) from error
        self._dtypes = {
            "float32": nccl.NCCL_FLOAT32,
            "float16": nccl.NCCL_FLOAT16,
            "bfloat16": nccl.NCCL_BFLOAT16,
            "int32": nccl.NCCL_INT32,
            "uint64": nccl.NCCL_UINT64,
            "uint8": nccl.NCCL_UINT8,
        }

    @property
    def handle(self) -> int:
        """Address of the ``ncclComm_t``."""
        address: int = self._comm.comm
        return address

    def all_reduce(self, array: DeviceArray) -> DeviceArray:
        """Sum over ranks, in place. *Collective.*"""
        pointer, count, dtype = self._operand(array)
        self._comm.allReduce(pointer, pointer, count, dtype, self._nccl.NCCL_SUM, _stream())
        return array

    def all_gather(self, array: DeviceArray, out: DeviceArray) -> DeviceArray:
        """Stack the ranks' arrays in ``out``. *Collective.*"""
        pointer, count, dtype = self._operand(array)
        assert out.size == self.size * count, (out.shape, array.shape)
        self._comm.allGather(pointer, out.data.ptr, count, dtype, _stream())
        return out

    def send(self, array: DeviceArray, dest: int) -> None:
        """Give ``array`` to ``dest``."""
        self._comm.send(*self._operand(array), dest, _stream())

    def recv(self, array: DeviceArray, source: int) -> DeviceArray:
        """Fill ``array`` from ``source``."""
        self._comm.recv(*self._operand(array), source, _stream())
        return array

    def check(self) -> None:
        """Raise `CommunicatorError` if a peer or a link was lost."""
        try:
            self._comm.check_async_error()
        except self._nccl.NcclError as error:
            raise CommunicatorError(f"NCCL lost a peer of rank {self.rank} of {self.size}: {error}") from error

    def abort(self) -> None:
        """End what is in flight without its peers, and release the group.

        Waits for graphs that were captured with it to be gone.
        """
        if self._is_open:
            self._is_open = False
            self._comm.abort()

    def close(self) -> None:
        """Release the group. *Collective*, but not after `abort`, which leaves nothing to do.

        A communicator that is only dropped keeps the process from exiting.
        """
        if self._is_open:
            self._is_open = False
            self._comm.destroy()

    def _operand(self, array: DeviceArray) -> tuple[int, int, int]:
        assert array.flags.c_contiguous, array.strides
        return array.data.ptr, array.size, self._dtypes[array.dtype.name]


def open_device_group(comm: Communicator, members: range) -> DeviceCommunicator:
    """NCCL among some ranks of ``comm``, this one among them. *Collective over* ``members``."""
    host = comm.split(members)
    try:
        return NcclCommunicator(host) if host.size > 1 else SelfDeviceCommunicator()
    finally:
        host.close()


def nccl_version() -> str:
    """Such as ``2.32.3``.

    Raises:
        ConfigError: NCCL cannot be loaded.
    """
    number: int = _nccl().get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def wait_for(event: Any, groups: Sequence[DeviceCommunicator], timeout_seconds: float,
             drop_graphs: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
    """Wait until the device has passed ``event``, polling ``groups`` for lost peers.

    Args:
        drop_graphs: forget the captured graphs that use the groups; called before those are aborted.

    Raises:
        CommunicatorError: a peer was lost, or nothing happened for ``timeout_seconds``; the groups are aborted first.
    """
    if all(group.size == 1 for group in groups):
        event.synchronize()
        return
    start = clock()
    next_check = start + _CHECK_SECONDS
    while not event.done:
        now = clock()
        if now - start < _SPIN_SECONDS:
            os.sched_yield()
            continue
        time.sleep(_SLEEP_SECONDS)
        if now >= next_check:
            next_check = now + _CHECK_SECONDS
            try:
                _check(groups, now - start, timeout_seconds)
            except CommunicatorError as error:
                _abort(groups, drop_graphs, error)
                raise


def _check(groups: Sequence[DeviceCommunicator], waited: float, timeout_seconds: float) -> None:
    for group in groups:
        group.check()
    if waited > timeout_seconds:
        raise CommunicatorError(
            f"the device has not finished a step for {waited:.0f} s (limit {timeout_seconds:.0f}); "
            "a rank is gone or stuck"
        )


def _abort(groups: Sequence[DeviceCommunicator], drop_graphs: Callable[[], None], error: CommunicatorError) -> None:
    """End what is in flight, or this process.

    NCCL's abort waits, inside a call that keeps Python from running, until no captured graph refers to the group; and graphs
    that are queued on the device after another group's end only with that one. The watchdog needs no Python.
    """
    sys.stderr.write(f"phalanx: {error}; ending what is in flight\n")
    sys.stderr.flush()
    faulthandler.dump_traceback_later(_ABORT_SECONDS, exit=True, file=_STANDARD_ERROR)
    try:
        drop_graphs()
        for group in groups:
            group.abort()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _nccl() -> Any:
    # NCCL prints to standard output by itself, which belongs to results.
    os.environ.setdefault("NCCL_DEBUG_FILE", "/dev/stderr")
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except Exception as error:
        raise ConfigError(
            f"NCCL cannot be loaded ({error}); install nvidia-nccl-cu13 (or -cu12), or use one GPU"
        ) from error
    return nccl


def _stream() -> int:
    import cupy

    pointer: int = cupy.cuda.get_current_stream().ptr
    return pointer
