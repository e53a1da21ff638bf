# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels of one device, loaded on first use and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from phalanx.kernels.compiler import KernelSpec, architecture_name, compile_cubin, load_source
from phalanx.kernels.programmatic_launch import ProgrammaticFunction

__all__ = ["KernelFunction", "KernelLibrary", "Library"]


FIRST_WITH_CLUSTERS = 90
"""Compute capability of Hopper."""


class KernelFunction(Protocol):
    """A launchable kernel: enqueues on the current stream and does not wait."""

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0
    ) -> None: ...


class Library(Protocol):
    """What every wrapper in this package takes first: a source of compiled kernels."""

    def function(self, source: str, name: str, shared_bytes: int = 0, **defines: str | int | float) -> KernelFunction:
        """Kernel ``name`` of ``<source>.cu`` compiled with ``defines``."""
        ...

    @property
    def architecture(self) -> str:
        """What kernels are compiled for, such as ``"sm_90a"``; decides tile sizes and instruction paths."""
        ...

    @property
    def num_multiprocessors(self) -> int:
        """Streaming multiprocessors of the device: what a grid should fill."""
        ...

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can share memory in clusters (Hopper and later)."""
        ...


class KernelLibrary:
    """The kernels of the current CUDA device.

    Loading a kernel may compile it and always allocates device memory: call every wrapper once before a stream is captured.
    """

    def __init__(self, cache: Path | None = None) -> None:
        import cupy

        device = cupy.cuda.Device()
        self.architecture = architecture_name(device.compute_capability)
        self.num_multiprocessors: int = device.attributes["MultiProcessorCount"]
        self.has_clusters = int(device.compute_capability) >= FIRST_WITH_CLUSTERS
        self._cache = cache
        self._modules: dict[KernelSpec, Any] = {}
        self._functions: dict[tuple[KernelSpec, str, int], KernelFunction] = {}

    def function(self, source: str, name: str, shared_bytes: int = 0, **defines: str | int | float) -> KernelFunction:
        """Kernel ``name`` of ``<source>.cu``; ``shared_bytes`` is the dynamic shared memory that it may be launched with.

        Raises ExecutorError when it does not compile.
        """
        spec = KernelSpec.of(source, defines)
        key = (spec, name, shared_bytes)
        if key not in self._functions:
            self._functions[key] = self._load(spec, name, shared_bytes)
        return self._functions[key]

    def _load(self, spec: KernelSpec, name: str, shared_bytes: int) -> KernelFunction:
        import cupy
        from cupy_backends.cuda.api import driver  # type: ignore[import-untyped,unused-ignore]

        if spec not in self._modules:
            module = cupy.cuda.function.Module()
            module.load(compile_cubin(spec, self.architecture, self._cache))
            self._modules[spec] = module
        function: Any = self._modules[spec].get_function(name)
        if shared_bytes > 48 * 1024:
            driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        if self.has_clusters and load_source(spec.source).overlaps_previous:
            return ProgrammaticFunction(function.ptr, name)
        loaded: KernelFunction = function
        return loaded
