"""A stand-in for a GPU: host memory at real addresses, and execution contexts that interpret the network on it.

So `DeviceSession` runs as it is: every shape that it sets, every address that it binds and every copy that it makes decide
the numbers that come out. What is not shown is that the library and the device do the same.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.arena import ALIGNMENT_BYTES, Arena
from phalanx.parallel.communicator import Communicator
from phalanx.runtime.executors.tensorrt import buffers as trt_buffers
from phalanx.runtime.executors.tensorrt import session as trt_session
from phalanx.runtime.executors.tensorrt.network import ProfileShapes

from .interpreter import NetworkInterpreter
from .networks import WrittenNetwork

Array = np.ndarray[Any, Any]

SCRATCH_BYTES = 4096


class HostMemory(np.ndarray):  # type: ignore[type-arg]
    """Host bytes that tell their address as device arrays do."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


def allocate(num_bytes: int) -> HostMemory:
    """Aligned, filled with a value that shows when it is used unwritten."""
    raw = np.full(num_bytes + ALIGNMENT_BYTES, 0xFF, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + num_bytes].view(HostMemory)


class HostGroup:
    """`DeviceCommunicator` over a host communicator."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.rank, self.size, self.handle = comm, comm.rank, comm.size, 4096 + comm.rank
        self.closed = False

    def send(self, array: Array, dest: int) -> None:
        self._comm.send(np.asarray(array), dest, 7)

    def recv(self, array: Array, source: int) -> Array:
        return self._comm.recv(array, source, 7)

    def close(self) -> None:
        self.closed = True


class InterpretedContext:
    """An execution context: refuses what the library would refuse, then interprets."""

    def __init__(self, engine: InterpretedEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile: ProfileShapes = {}
        self.communicator: Any = None
        self.config: RuntimeConfig | None = None
        self.scratch = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = self._engine.profiles[profile]
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_communicator(self, communicator: Any) -> bool:
        self.communicator = communicator
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.tensor_names and address % ALIGNMENT_BYTES == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._profile[name]
        self._shapes[name] = shape
        return all(low <= extent <= high for low, extent, high in zip(smallest, shape, largest, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch[1] >= SCRATCH_BYTES
        assert self._profile.keys() == self._shapes.keys()
        inputs = {name: self._array(name, shape).copy() for name, shape in self._shapes.items()}
        outputs = self._engine.interpreter.run(inputs)
        for name, value in outputs.items():
            if name.endswith(".updated"):
                assert self._addresses[name] == self._addresses[name.removesuffix(".updated")], "caches must alias"
            self._array(name, value.shape)[...] = value
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        is_int = name in ("token_ids", "positions", "write_indices", "logit_rows", "token_out")
        count = int(np.prod(shape))
        memory = ((ctypes.c_int32 if is_int else ctypes.c_float) * count).from_address(self._addresses[name])
        return np.ctypeslib.as_array(memory).reshape(shape)


class InterpretedEngine:
    """An engine that was never built."""

    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, written: WrittenNetwork, tensor_group: Communicator) -> None:
        network = written.network.graph.network
        self.interpreter = NetworkInterpreter(written.library.module, network, tensor_group, written)
        self.profiles = written.network.profiles
        outputs = {network.get_output(index).name for index in range(network.num_outputs)}
        self.tensor_names = self.interpreter.input_names | outputs
        self.contexts: list[InterpretedContext] = []

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> InterpretedContext:
        assert config.strategy.name == "USER_MANAGED"
        self.contexts.append(InterpretedContext(self))
        self.contexts[-1].config = config
        return self.contexts[-1]


class RuntimeConfig:
    """What contexts are created with, as TensorRT for RTX has it."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.cache: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> KernelCache:
        return KernelCache()

    def set_runtime_cache(self, cache: KernelCache) -> bool:
        self.cache = cache
        return True


class KernelCache:
    """Grows by what it was given."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content + b"."


class Event:
    """Everything is done at once."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record(self, stream: object) -> None:
        """Nothing to remember."""


class Stream:
    """Everything is done at once; also stands for the device."""

    ptr = 1
    id = 0

    def record(self) -> Event:
        """A new event."""
        return Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def replace_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `trt_session` allocate and copy on the host, and capture nothing."""

    def copy(target: Array, source: Array, stream: object) -> None:
        ctypes.memmove(np.ndarray.__getattribute__(target, "ctypes").data, source.ctypes.data, source.nbytes)

    monkeypatch.setattr(trt_buffers, "Arena", lambda num_bytes: Arena(num_bytes, allocate))
    monkeypatch.setattr(trt_session, "pinned_array", lambda shape, dtype: np.zeros(shape, dtype))
    monkeypatch.setattr(trt_session, "upload", copy)
    monkeypatch.setattr(trt_session, "download", copy)
    monkeypatch.setattr(trt_session, "wait_for", lambda *_: None)
    monkeypatch.setattr(trt_session.DeviceSession, "_can_capture", lambda session: False)
