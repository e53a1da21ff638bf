# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.6: what it does otherwise than the releases of `phalanx.runtime.executors.tensorrt.library`.

It has matrix products, reductions, element-by-element layers and FP16, but no bfloat16, no strongly typed networks and no layers
for attention, caches, rotary embedding or collectives. So its networks are segments between those, each layer of which is told
the type that it must compute and return.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.tensorrt.library import ITensor, TensorRT

__all__ = ["TensorRT8"]

_OPTIMIZATION_LEVEL = 1
"""Of 0 to 5. On an H200 level 3 took four times as long to build a Llama-3-8B block as level 1 and ran no faster."""

_NEWEST = 9.0
"""Compute capability of Hopper, the last that it has kernels for."""


@dataclass(frozen=True, slots=True)
class TensorRT8(TensorRT):
    """TensorRT 8.6. ``version`` is the library's; that of the bindings may differ in its last number."""

    @staticmethod
    def of(module: ModuleType) -> TensorRT8:
        """The adapter of an imported module."""
        number = ctypes.CDLL("libnvinfer.so.8").getInferLibVersion()
        return TensorRT8(module, "tensorrt", f"{number // 1000}.{number // 100 % 10}.{number % 100}")

    @property
    def computes_segments(self) -> bool:
        return True

    @property
    def has_fused_layers(self) -> bool:
        return False

    @property
    def has_fp8_cache(self) -> bool:
        return True  # the cache is the CUDA executor's

    @property
    def shape_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int32)

    @property
    def can_refit(self) -> bool:
        return False

    def check_target(self, capability: str) -> None:
        if not 8.0 <= float(capability) <= _NEWEST:
            raise ConfigError(
                f"compute capability {capability} is outside 8.0 to {_NEWEST}, which {self.name} and Phalanx's kernels share; "
                "install another TensorRT, or use --engine cuda"
            )

    # Networks

    def create_network(self, builder: Any) -> Any:
        return builder.create_network(1 << int(self.module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))

    def keep_type(self, layer: Any, dtype: Any) -> None:
        if dtype in (self.module.DataType.FLOAT, self.module.DataType.HALF):
            layer.precision = dtype
            layer.set_output_type(0, dtype)

    def keep_output_type(self, tensor: ITensor, dtype: Any) -> None:
        tensor.dtype = dtype

    def weights(self, array: NDArray[Any]) -> Any:
        return self.module.Weights(array)

    # Building

    def configure_types(self, config: Any, dtype: np.dtype[Any]) -> None:
        """Hold the builder to the types that layers are told, and to few and quick measurements."""
        flags = self.module.BuilderFlag
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        if dtype == np.float16:
            config.set_flag(flags.FP16)
        else:
            self.forbid_tf32(config)
        config.builder_optimization_level = _OPTIMIZATION_LEVEL
        config.max_aux_streams = 0
        config.set_tactic_sources(0)  # cuBLAS 12 and cuDNN 8, which it would look for, are not needed

    # Execution

    def create_segment_context(self, engine: Any, profile: int, scratch: int, stream: int) -> Any:
        """A context of ``engine`` on a profile, with device memory at ``scratch``; None if the library refuses."""
        context = engine.create_execution_context_without_device_memory()
        if context is None or not context.set_optimization_profile_async(profile, stream):
            return None
        context.device_memory = scratch
        return context
