"""A stand-in for the module ``tensorrt_bindings`` 8.6: a builder that takes networks apart by name, and engines that compute them.

Networks are written with the installed TensorRT for RTX; what is checked is how Phalanx builds, loads and calls.
"""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from phalanx.parallel.communicator import SelfCommunicator
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8

from .interpreter import NetworkInterpreter

Array = np.ndarray[Any, Any]


class BuilderConfig:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.profiles: list[dict[str, Any]] = []
        self.builder_optimization_level = -1
        self.max_aux_streams = -1
        self.cache = b""

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.append(f"not {flag}")

    def set_tactic_sources(self, sources: int) -> None:
        assert sources == 0

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, serialized: bytes) -> bytes:
        return serialized

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.cache = cache + b"."

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.cache)


class Profile:
    """Shapes by input."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class Context:
    """Interprets the network on host memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.device_memory = engine, 0
        self._profile = -1
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.profiles[self._profile][name]
        self.shapes[name] = shape
        return all(a <= extent <= b for a, extent, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        interpreter = self._engine.interpreter
        network = interpreter._network
        inputs = {}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = self.shapes.get(tensor.name, tuple(tensor.shape))
            inputs[tensor.name] = self._array(tensor, shape).astype(np.float32)
        results = interpreter.run(inputs)
        for index in range(network.num_outputs):
            tensor = network.get_output(index)
            value = results[tensor.name]
            self._array(tensor, value.shape)[...] = value
        return True

    def _array(self, tensor: Any, shape: tuple[int, ...]) -> Array:
        dtype = np.dtype({"FLOAT": np.float32, "HALF": np.float16}[tensor.dtype.name])
        memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[tensor.name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    """A plan, deserialised."""

    device_memory_size = 4096

    def __init__(self, interpreter: NetworkInterpreter, profiles: list[dict[str, Any]]) -> None:
        self.interpreter, self.profiles = interpreter, profiles

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


class Bindings:
    """The module. ``plans`` outlive the builder, as files do.

    Attributes:
        configs: of every build.
        kept: constants, which an interpreted plan does not hold.
    """

    def __init__(self, rtx: ModuleType) -> None:
        self._rtx = rtx
        self.plans: dict[bytes, tuple[Any, BuilderConfig]] = {}
        self.configs: list[BuilderConfig] = []
        self.kept: list[Array] = []
        self.BuilderFlag = SimpleNamespace(OBEY_PRECISION_CONSTRAINTS="obey", FP16="fp16", TF32="tf32")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rtx, name)

    def Builder(self, logger: Any) -> Any:
        builder = self._rtx.Builder(logger)

        def build(network: Any, config: BuilderConfig) -> bytes:
            plan = b"plan %d" % len(self.plans)
            self.plans[plan] = NetworkInterpreter(self._rtx, network, SelfCommunicator(), builder), config
            self.configs.append(config)
            return plan

        return SimpleNamespace(
            create_network=builder.create_network, create_builder_config=BuilderConfig,
            create_optimization_profile=Profile, build_serialized_network=build,
        )  # fmt: skip

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Engine | None:
            if plan not in self.plans:
                return None
            interpreter, config = self.plans[plan]
            return Engine(interpreter, config.profiles)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class BoundTensorRT8(TensorRT8):
    """TensorRT 8.6 over `Bindings`, its networks written as TensorRT for RTX takes them."""

    create_network = TensorRT.create_network
    keep_type = TensorRT.keep_type
    keep_output_type = TensorRT.keep_output_type
    shape_dtype = TensorRT.shape_dtype

    def weights(self, array: Array) -> Any:
        self.module.kept.append(array)
        return TensorRT.weights(self, array)

    @staticmethod
    def over(rtx: ModuleType) -> BoundTensorRT8:
        """With fresh bindings."""
        return BoundTensorRT8(Bindings(rtx), "tensorrt", "8.6.0")  # type: ignore[arg-type]
