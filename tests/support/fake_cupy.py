"""Just enough of CuPy, over NumPy, to run the CUDA executor's host side and its kernels (emulated) where there is no
GPU.

Streams run everything at once and graphs are not captured; what only a device shows is for ``tests/gpu``. One thing that a device
rarely shows is held to here: the source of an asynchronous copy stays as it is until the copy is done, unless it is page-locked.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import E4M3, Codes, dequantize
from phalanx.kernels.gemm import Gemm
from phalanx.kernels.gemv import gated_gemv, gemv_takes
from phalanx.kernels.packed import PackedWeight, gemv_packed, layout_suits_gemv, unpack_weight
from phalanx.kernels.quantize import QuantizedRows
from phalanx.kernels.quantize_groups import QuantizedGroups
from phalanx.kernels.tuning import GemmTimings
from phalanx.parallel.communicator import Communicator
from tests.kernels.emulation import EmulatedLibrary
from tests.support.fake_cublaslt import FakeCublasLt

__all__ = ["install_fake_cupy", "install_fake_device"]

CODES = {"fp8": E4M3, "int8": np.dtype(np.int8)}


class FakeArray(np.ndarray):
    """A NumPy array whose ``data`` has an address, as CuPy's has."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def __array_finalize__(self, source: Any) -> None:
        self.memory = getattr(source, "memory", None)


class Memory:
    """Zeros, which take memory once they are written to."""

    def __init__(self, size: int) -> None:
        self.buffer = np.zeros(max(size, 1) + 256, np.uint8)
        self.ptr = -(-self.buffer.ctypes.data // 256) * 256


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: Any) -> None:
        self.ptr, self.owner = ptr, owner


class MemoryPointer:
    def __init__(self, memory: Any, offset: int) -> None:
        self.memory, self.ptr = memory, memory.ptr + offset


def device_array(shape: tuple[int, ...], dtype: Any, memptr: MemoryPointer) -> FakeArray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.ctypeslib.as_array((ctypes.c_char * size).from_address(memptr.ptr)).view(np.uint8)
    array = raw.view(dtype).reshape(shape).view(FakeArray)
    array.memory = memptr
    return array


def _zeros(shape: Any, dtype: Any) -> FakeArray:
    shape = shape if isinstance(shape, tuple) else (shape,)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return device_array(shape, dtype, MemoryPointer(Memory(size), 0))


def _copy(array: np.ndarray) -> FakeArray:
    out = _zeros(array.shape, array.dtype)
    out[...] = array
    return out


class Stream:
    ptr = 0

    def __init__(self, non_blocking: bool = False) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None:
        _COPIES.is_waited_for = True


class _Copies(threading.local):
    """Of this rank's host memory: whether the last source that was not page-locked has been waited for."""

    is_waited_for = True

    def check(self) -> None:
        assert self.is_waited_for, "an asynchronous copy from memory that is not page-locked was not waited for"


_COPIES = _Copies()
_PINNED: dict[int, int] = {}
"""Address -> size of page-locked memory."""


def _pinned(size: int) -> bytearray:
    memory = bytearray(max(size, 1))
    _PINNED[ctypes.addressof(ctypes.c_char.from_buffer(memory))] = len(memory)
    return memory


class Event:
    done = True

    def __init__(self, disable_timing: bool = False) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None: ...


class Device:
    id = 0

    def __init__(self, index: int = 0) -> None: ...

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None: ...

    def use(self) -> None: ...


def _copy_rows(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, stream: int
) -> None:
    _COPIES.check()
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
    _COPIES.is_waited_for = any(start <= source < start + size for start, size in list(_PINNED.items()))


def _elapsed_ms(start: Event, end: Event) -> float:
    return 1e3 * (end.seconds - start.seconds)


def _fake_cupy() -> types.ModuleType:
    runtime = types.ModuleType("cupy.cuda.runtime")
    runtime.__dict__.update(
        getDeviceProperties=lambda device: {"name": b"emulator"},
        memcpyAsync=lambda target, source, size, kind, stream: ctypes.memmove(target, source, size),
        memcpy2DAsync=_copy_rows,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        streamCaptureModeThreadLocal=1,
        memGetInfo=lambda: (1 << 32, 1 << 32),
        getDeviceCount=lambda: 1,
    )
    cuda = types.ModuleType("cupy.cuda")
    cuda.__dict__.update(
        runtime=runtime, Stream=Stream, Event=Event, Device=Device, Memory=Memory, UnownedMemory=UnownedMemory,
        MemoryPointer=MemoryPointer, get_current_stream=Stream, get_elapsed_time=_elapsed_ms,
        alloc_pinned_memory=_pinned,
    )  # fmt: skip
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        cuda=cuda,
        ndarray=device_array,
        zeros=_zeros,
        empty=_zeros,
        asarray=_copy,
        ascontiguousarray=_copy,
        asnumpy=lambda array: np.array(array),
    )
    return cupy


class OneAtATime:
    """A library whose kernels may be launched from several threads: the emulator runs one block at a time."""

    architecture = "sm_90a"

    def __init__(self, library: EmulatedLibrary) -> None:
        self._library, self._lock = library, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def function(self, *names: Any, **defines: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            _COPIES.check()
            with self._lock:
                self._library.function(*names, **defines)(*arguments, **options)

        return launch


class HostGroup:
    """A device communicator over a host communicator."""

    def __init__(self, host: Communicator) -> None:
        self._host, self.rank, self.size = host, host.rank, host.size

    def all_reduce(self, array: Any) -> Any:
        with np.errstate(all="ignore"):  # padding rows hold anything
            return self._host.all_reduce(array) if self.size > 1 else array

    def all_gather(self, array: Any, out: Any) -> Any:
        out[...] = self._host.all_gather(array).reshape(out.shape)
        return out

    def send(self, array: Any, dest: int) -> None:
        self._host.send(array, dest)

    def recv(self, array: Any, source: int) -> Any:
        return self._host.recv(array, source)

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None:
        self._host.close()


class FakeGemm:
    """`Gemm` without cuBLASLt: products by NumPy; gated ones by the kernels that stream weights, which need 16 bits."""

    def __init__(self, library: Any, has_blocks: bool = False) -> None:
        self._library = library
        self._of_blocks = Gemm(library, FakeCublasLt(), GemmTimings(None), multiplies_blocks=True)  # type: ignore[arg-type]

    def __call__(self, x: Any, *operands: Any, scratch: Any = None) -> None:
        if isinstance(x, QuantizedGroups):
            self._of_blocks(x, *operands)
        else:
            product(self._library, x, *operands, scratch=scratch)

    def takes_groups(self, num_tokens: int, weight: Any, dtype: str, has_bias: bool) -> bool:
        return self._of_blocks.takes_groups(num_tokens, weight, dtype, has_bias)

    def gated(self, x: Any, weight: Any, out: Any, activation: Any) -> bool:
        if isinstance(weight, QuantizedRows):
            return False
        if isinstance(weight, PackedWeight):
            suits = x.dtype.itemsize == 2 and layout_suits_gemv(len(x), weight.columns, weight.layout)
            run: Any = partial(gemv_packed, gated=activation)
        else:
            suits = gemv_takes(len(x), weight.shape[1], x.dtype.name)
            run = partial(gated_gemv, activation=activation)
        if suits:
            run(self._library, x, weight, out)
        return suits


def product(library: Any, x: Any, weight: Any, out: Any, bias: Any = None, scratch: Any = None) -> None:
    """What `Gemm` computes, by NumPy; packed weights by the kernel that streams them, or unpacked where it does not take them."""
    if isinstance(weight, PackedWeight):
        if x.dtype.itemsize == 2 and layout_suits_gemv(len(x), weight.columns, weight.layout):
            gemv_packed(library, x, weight, out, bias=bias)
            return
        values = scratch[: weight.shape[0] * weight.shape[1] * x.dtype.itemsize].view(x.dtype).reshape(weight.shape)
        unpack_weight(library, weight, values)
        weight = values
    if isinstance(weight, QuantizedRows):
        left, right = (
            dequantize(Codes(np.asarray(rows.codes).view(CODES[rows.kind]), np.asarray(rows.scale)[:, None]))
            for rows in (x, weight)
        )
        with np.errstate(all="ignore"):  # padding rows hold anything
            total = left @ right.T
            out[...] = total if bias is None else total + bias.astype(np.float32)
        return
    with np.errstate(all="ignore"):
        out[...] = x @ weight.T if bias is None else x @ weight.T + bias


def install_fake_cupy(patch: pytest.MonkeyPatch) -> types.ModuleType:
    """Make ``import cupy`` give what is here; returns it."""
    cupy = _fake_cupy()
    for name, module in {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.runtime": cupy.cuda.runtime}.items():
        patch.setitem(sys.modules, name, module)
    return cupy


def install_fake_device(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make ``engine="cuda"`` run here: emulated kernels, NumPy products, ranks joined by their host communicator."""
    from phalanx.runtime.executors.cuda import build as cuda_factory
    from phalanx.runtime.executors.cuda import graphs as cuda_graphs

    install_fake_cupy(patch)
    library = OneAtATime(EmulatedLibrary(cache))
    patch.setattr(cuda_factory, "KernelLibrary", lambda: library)
    patch.setattr(cuda_factory, "open_gemm", FakeGemm)
    patch.setattr(cuda_factory, "tune_products", lambda *_: None)
    patch.setattr(cuda_factory, "open_device_group", lambda comm, members: HostGroup(comm.split(members)))
    patch.setattr(cuda_factory, "_tensor_group", lambda _library, comm, members: HostGroup(comm.split(members)))
    patch.setattr(cuda_graphs.GraphCache, "_capture", lambda *_: None)
