# SPDX-License-Identifier: Apache-2.0
"""How the releases of TensorRT differ.

Two products share one network API: ``tensorrt`` (10.16 and 11.x) and ``tensorrt_rtx`` (1.7, TensorRT for RTX). Everything
that differs between them or between releases is a method here; the rest of the executor never asks for a version. TensorRT 8.6,
which lacks a decoder's layers, is a subclass: `phalanx.runtime.executors.tensorrt.library8`.

    difference                  tensorrt 10.16       tensorrt 11.x        tensorrt_rtx 1.7
    attention                   add_attention        add_attention_v2     add_attention_v2
    collectives                 preview feature      yes                  yes
    build without a GPU         no                   no                   yes, for named compute capabilities
    timing cache                yes                  yes                  accepted, always empty
    stripped plan and refit     yes                  yes                  no
    stream capture              whole step           whole step           asked of the context
    kernels                     in the plan          in the plan          compiled on the GPU, kept in a cache
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.tensorrt.device import compute_capability

__all__ = ["Flavour", "ITensor", "TensorRT", "library_warnings_ignored"]

ITensor: TypeAlias = Any
"""A symbolic tensor of a network under construction (``tensorrt.ITensor``; the library has no type information)."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]

_DATA_TYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "FLOAT",
    FLOAT_DTYPES["F16"]: "HALF",
    FLOAT_DTYPES["BF16"]: "BF16",
    np.dtype(np.int32): "INT32",
    np.dtype(np.int64): "INT64",
    np.dtype(np.int8): "INT8",
    FLOAT_DTYPES["F8_E4M3"]: "FP8",
}

_FIRST_WITH_FP8 = 8.9
"""Compute capability (Ada). For older ones the builder refuses networks with fp8 ("HW-specific datatypes")."""


@dataclass(frozen=True, slots=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        module: the library's Python module.
        flavour: which product it is.
        version: as the library writes it.
    """

    module: ModuleType
    flavour: Flavour
    version: str

    @property
    def name(self) -> str:
        """For messages and ``config.json``: ``tensorrt_rtx 1.7.1.116``."""
        return f"{self.flavour} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that engines can be built for, whatever GPU is here; empty = only the GPU that is here.

        Attention needs 8.0 or later.
        """
        if self.flavour == "tensorrt":
            return ()
        names = (name[2:] for name in dir(self.module.ComputeCapability) if name.startswith("SM"))
        capabilities = sorted((int(name[:-1]), int(name[-1])) for name in names)
        return tuple(f"{major}.{minor}" for major, minor in capabilities if major >= 8)

    def check_target(self, capability: str) -> None:
        """Refuse a GPU that this library cannot run attention on.

        Raises:
            ConfigError: with what can be done instead.
        """
        if self.targets and capability not in self.targets:
            raise ConfigError(
                f"compute capability {capability} is not supported by {self.name} (it has {', '.join(self.targets)}); "
                "install tensorrt for data centre GPUs, or use --engine cuda"
            )
        if float(capability) < 8.0:
            raise ConfigError(
                f"compute capability {capability} is below 8.0, which TensorRT's attention needs; use --engine cuda or numpy"
            )

    def data_type(self, dtype: np.dtype[Any]) -> Any:
        """The library's type for a NumPy type."""
        return getattr(self.module.DataType, _DATA_TYPES[np.dtype(dtype)])

    @property
    def computes_segments(self) -> bool:
        """Whether networks hold only what lies between attention and sums; see `phalanx.runtime.executors.tensorrt.segments`."""
        return False

    @property
    def has_fused_layers(self) -> bool:
        """Whether networks have layers for GELU and normalisation."""
        return True

    @property
    def shape_dtype(self) -> np.dtype[Any]:
        """The type of shape tensors."""
        return np.dtype(np.int64)

    # Networks

    def keep_type(self, layer: Any, dtype: Any) -> None:
        """Compute and return ``dtype`` in ``layer``: networks here are strongly typed already."""

    def keep_output_type(self, tensor: ITensor, dtype: Any) -> None:
        """Return ``dtype`` as a network output: networks here are strongly typed already."""

    def create_network(self, builder: Any) -> Any:
        """An empty strongly typed ``INetworkDefinition``: types are as written, never chosen by the builder."""
        return builder.create_network(1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def attention(self, network: Any, query: ITensor, key: ITensor, value: ITensor, mask: ITensor) -> ITensor:
        """Softmax attention with ``mask`` ``[B, 1, N, P]`` added to the scores: ``[B, H, N, C]``.

        Key/value lengths and causal kinds (11.x) are left out on purpose: with a cache of fixed length, fused kernels of 11.1
        and 11.2 were seen to read past the length or to refuse the fourth input (NVIDIA/TensorRT-Model-Connect #1035,
        #1048). A mask means the same in every release; an added one, because a boolean one does not build in RTX 1.7
        where no fused kernel fits the head size and only one layer uses it. Then the builder uses several kernels.
        """
        softmax = self.module.AttentionNormalizationOp.SOFTMAX
        if hasattr(network, "add_attention_v2"):
            layer = network.add_attention_v2(query, key, value, softmax, self.module.CausalMaskKind.NONE)
        else:
            layer = network.add_attention(query, key, value, softmax, False)
        layer.mask = mask
        layer.decomposable = True
        return layer.get_output(0)

    def weights(self, array: NDArray[Any]) -> Any:
        """A view of host memory, which must stay untouched until the engine is built."""
        return self.module.Weights(self.data_type(array.dtype), array.ctypes.data, array.size)

    def packed_weights(self, packed: NDArray[np.uint8]) -> Any:
        """A view of codes of 4 bits, two in each byte, the first in the low half. As `weights`."""
        return self.module.Weights(self.module.DataType.INT4, packed.ctypes.data, 2 * packed.size)

    def code_kinds(self, targets: Sequence[str]) -> frozenset[str]:
        """Kinds of codes (``int4``, ``int8``, ``fp8``) that networks for these compute capabilities may hold."""
        has_fp8 = all(float(capability) >= _FIRST_WITH_FP8 for capability in targets)
        return frozenset({"int4", "int8", "fp8"} if has_fp8 else {"int4", "int8"})

    @property
    def has_fp8_cache(self) -> bool:
        """Whether keys and values may be held as fp8.

        RTX 1.7 refuses it ("cache has type FP8 but must have type Float, Half, or BFloat16"); the others are taken to do the same.
        """
        return False

    # Building

    def enable_collectives(self, config: Any) -> None:
        """Allow collectives in the network: 10.16 has them as a preview, later releases without asking."""
        feature = getattr(self.module.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
        if feature is not None:
            config.set_preview_feature(feature, True)

    def check_targets(self, targets: Sequence[str]) -> None:
        """Refuse compute capabilities that this library cannot build for.

        Raises:
            ConfigError: with those that it can.
        """
        if self.flavour == "tensorrt_rtx":
            for capability in targets:
                self.check_target(capability)
        elif tuple(targets) != (local := self.default_targets()):
            raise ConfigError(
                f"--target-compute-capability {','.join(targets)} is not this machine's GPU ({local[0]}), and {self.name} "
                "builds only for the GPU it runs on; build on the target machine, or with tensorrt-rtx"
            )

    def set_targets(self, config: Any, targets: Sequence[str]) -> None:
        """Build for these compute capabilities, which `check_targets` has passed."""
        if self.flavour == "tensorrt":
            return
        config.num_compute_capabilities = len(targets)
        for index, capability in enumerate(targets):
            name = "SM" + capability.replace(".", "")
            config.set_compute_capability(getattr(self.module.ComputeCapability, name), index)

    def default_targets(self) -> tuple[str, ...]:
        """The GPU of this machine.

        Raises:
            ConfigError: there is none, or the library does not support it.
        """
        capability = compute_capability()
        if capability is None:
            way_out = (
                f"say what to build for: --target-compute-capability with one or more of {', '.join(self.targets)}"
                if self.targets
                else "build on the machine that will run the engine, or install tensorrt-rtx, which can build without a GPU"
            )
            raise ConfigError(f"no GPU was found here; {way_out}")
        self.check_target(capability)
        return (capability,)

    @property
    def can_refit(self) -> bool:
        """Whether plans can leave weights out, to be filled in when the engine is loaded."""
        return self.flavour == "tensorrt"

    def set_refit(self, config: Any) -> None:
        """Leave the weights that the network marks out of the plan, to take any values later.

        Only those: tables and scales of the model's structure stay in the plan, and may be folded.
        """
        config.set_flag(self.module.BuilderFlag.REFIT_INDIVIDUAL)
        config.set_flag(self.module.BuilderFlag.STRIP_PLAN)

    def forbid_tf32(self, config: Any) -> None:
        """Multiply float32 in float32: by default mantissas may be cut to ten bits."""
        config.clear_flag(self.module.BuilderFlag.TF32)

    def set_timing_cache(self, config: Any, serialized: bytes) -> None:
        """Start from earlier measurements of kernels."""
        with library_warnings_ignored():
            config.set_timing_cache(config.create_timing_cache(serialized), False)

    def timing_cache(self, config: Any) -> bytes:
        """The measurements after a build."""
        with library_warnings_ignored():
            return bytes(config.get_timing_cache().serialize())

    def logger(self, report: Callable[[str, str], None]) -> Any:
        """A logger that calls ``report(severity, message)``, severities being ``ERROR``, ``WARNING``, ``INFO``, ..."""
        base: Any = self.module.ILogger

        class Logger(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                report(str(severity).rsplit(".", 1)[-1], message)

        return Logger()

    def progress_monitor(self, report: Callable[[str, int, int], None]) -> Any:
        """A monitor that calls ``report(phase, step, num_steps)`` from the builder's threads."""
        base: Any = self.module.IProgressMonitor

        class Monitor(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)
                self.num_steps: dict[str, int] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                self.num_steps[phase_name] = num_steps
                report(phase_name, 0, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                report(phase_name, step + 1, self.num_steps.get(phase_name, 0))
                return True

            def phase_finish(self, phase_name: str) -> None:
                num_steps = self.num_steps.pop(phase_name, 0)
                report(phase_name, num_steps, num_steps)

        return Monitor()

    def stream_writer(self, write: Callable[[bytes], int]) -> Any:
        """A sink for a plan, so that it is never in memory as a whole; ``write`` returns the bytes taken."""
        base: Any = self.module.IStreamWriter

        class Writer(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def write(self, data: bytes) -> int:
                return write(data)

        return Writer()

    # Execution

    def create_kernel_cache(self, engine: Any, serialized: bytes) -> Any:
        """Where the contexts of ``engine`` share the kernels that TensorRT for RTX compiles when it runs; None elsewhere.

        ``serialized`` (empty = none) is what `serialize_kernel_cache` gave on this machine; anything else is ignored.
        """
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return None
        cache = config.create_runtime_cache()
        if serialized:
            cache.deserialize(serialized)
        return cache

    def serialize_kernel_cache(self, cache: Any) -> bytes:
        """The kernels compiled so far; empty where there is no cache."""
        return b"" if cache is None else bytes(cache.serialize())

    def create_context(self, engine: Any, kernel_cache: Any, is_captured: bool) -> Any:
        """An execution context whose device memory we provide; None if the library refuses.

        Args:
            is_captured: the context runs one shape, in a captured graph: then RTX must compile kernels for that shape at once,
                for a graph would keep the general ones that it uses until they are there.
        """
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if kernel_cache is not None:
            config.set_runtime_cache(kernel_cache)
            if is_captured:
                strategies = self.module.DynamicShapesKernelSpecializationStrategy
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config)

    def can_capture(self, context: Any, stream: int) -> bool:
        """Whether a step of ``context`` may be captured in a CUDA graph on ``stream``."""
        if hasattr(context, "is_stream_capturable"):
            return bool(context.is_stream_capturable(stream))
        return True


def library_warnings_ignored() -> warnings.catch_warnings[None]:
    """The bindings warn of calls that one of the two products has deprecated and the other needs."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)
