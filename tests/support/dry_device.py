"""A GPU that computes nothing: real sizes in an instant, with the limits that a launch has to keep and what a capture forbids.

Kernels and products are asked for, checked and counted; memory is address space that nothing writes to. Everything that a device would load or
allocate for the first time while a step is captured as a graph is an error here, as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.compiler import KernelSpec, load_source
from phalanx.kernels.cublaslt import Algorithm, GemmProblem
from phalanx.kernels.gemm import Gemm
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from tests.support.fake_cublaslt import ALGORITHM
from tests.support.fake_cupy import HostGroup, Stream, install_fake_cupy

__all__ = ["DryDevice", "install_dry_device"]

MOST_THREADS, MOST_BLOCKS, MOST_BLOCKS_BEYOND_X = 1024, (1 << 31) - 1, 65_535


@dataclass(slots=True)
class DryDevice:
    """An H200 as far as a host sees it, unless attributes are set otherwise before a start.

    Attributes:
        most_shared_bytes: of a block.
        kernels: every kernel that was loaded, with its threads and dynamic shared memory in bytes.
        problems: products that cuBLASLt was asked to compute.
        num_captured: steps that were captured as graphs.
    """

    architecture: str = "sm_90a"
    num_multiprocessors: int = 132
    has_clusters: bool = True
    most_shared_bytes: int = 232_448
    kernels: dict[tuple[KernelSpec, str], tuple[int, int]] = field(default_factory=dict)
    problems: dict[GemmProblem, None] = field(default_factory=dict)
    num_captured: int = 0
    is_capturing: bool = False

    def function(
        self, source: str, name: str, shared_bytes: int = 0, **defines: str | int | float
    ) -> Callable[..., None]:
        """See `phalanx.kernels.library.Library`."""
        key = KernelSpec.of(source, defines), name
        if key not in self.kernels:
            self.refuse_when_capturing(f"{name} of {source}.cu is loaded with {defines}")
            load_source(source)
            self.kernels[key] = 0, 0
        assert shared_bytes <= self.most_shared_bytes, (source, shared_bytes)

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
            assert 1 <= np.prod(block) <= MOST_THREADS, (source, block)
            assert 1 <= grid[0] <= MOST_BLOCKS, (source, grid)
            assert all(1 <= extent <= MOST_BLOCKS_BEYOND_X for extent in grid[1:]), (source, grid)
            assert shared_mem <= max(shared_bytes, 48 << 10), (source, shared_mem, shared_bytes)
            threads, shared = self.kernels[key]
            self.kernels[key] = max(threads, int(np.prod(block))), max(shared, shared_mem)

        return launch

    def refuse_when_capturing(self, what: str) -> None:
        assert not self.is_capturing, f"{what} while a step is captured"


@dataclass(slots=True)
class DryCublasLt:
    """Algorithms for everything but blocks of odd sizes; those of one size compute others, too, if they say so."""

    device: DryDevice
    accepts_others: bool
    version: int = 13_00_00

    def algorithms(self, problem: GemmProblem, count: int) -> list[Algorithm]:
        self.device.refuse_when_capturing(f"an algorithm for {problem.key} is looked for")
        assert self.device.architecture == "sm_90a" or not problem.has_scales, (
            f"{problem.key}: only Hopper has such scales"
        )
        return [ALGORITHM]

    def accepts(self, problem: GemmProblem, algorithm: Algorithm) -> bool:
        self.device.refuse_when_capturing(f"an algorithm for {problem.key} is tried")
        return self.accepts_others

    def run(self, problem: GemmProblem, *_: Any) -> None:
        if problem not in self.device.problems:
            self.device.refuse_when_capturing(f"{problem.key} is computed for the first time")
            self.device.problems[problem] = None


class DryTuner:
    """Products of codes are fastest, and of packed weights the kernels that stream them."""

    def __init__(self, gemm: Gemm, timings: GemmTimings) -> None:
        self._gemm, self._timings = gemm, timings

    def tune(self, problems: Sequence[GemmProblem]) -> Mapping[GemmProblem, GemmChoice]:
        found = {one: GemmChoice(self._gemm.candidates(one)[-1], 1.0 if one.has_blocks else 2.0) for one in problems}
        self._timings.add(found)
        return found


def install_dry_device(
    patch: pytest.MonkeyPatch, accepts_others: bool = True, multiplies_blocks: bool = True
) -> DryDevice:
    """Make ``engine="cuda"`` run on a device that computes nothing, without ranks; returns it."""
    from phalanx.kernels import gemm8_tiles
    from phalanx.runtime.executors.cuda import build, tuning

    device = DryDevice()

    class DryStream(Stream):
        def begin_capture(self, mode: int) -> None:
            device.is_capturing = True

        def end_capture(self) -> Any:
            device.is_capturing = False
            device.num_captured += 1
            return Graph()

        def synchronize(self) -> None:
            device.refuse_when_capturing("a stream is waited for")
            super().synchronize()

    class Graph:
        def launch(self, stream: Any) -> None: ...

    class Pool:
        def free_all_blocks(self) -> None: ...

    cupy = install_fake_cupy(patch)
    zeros = cupy.zeros

    def allocate(shape: Any, dtype: Any) -> Any:
        device.refuse_when_capturing(f"memory {shape} is allocated")
        return zeros(shape, dtype)

    for name in ("zeros", "empty"):
        patch.setattr(cupy, name, allocate)
    patch.setattr(cupy, "get_default_memory_pool", Pool, raising=False)
    patch.setattr(cupy.cuda, "Stream", DryStream)
    patch.setattr(cupy.cuda, "get_current_stream", DryStream)
    patch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (140 << 30, 141 << 30))
    patch.setattr(cupy.cuda.runtime, "memcpyAsync", lambda *_: None)
    patch.setattr(cupy.cuda.runtime, "memcpy2DAsync", lambda *_: None)
    patch.setattr(build, "KernelLibrary", lambda: device)
    patch.setattr(gemm8_tiles, "tensor_map", lambda *_: np.void(bytes(128)))  # which the driver makes
    lt: Any = DryCublasLt(device, accepts_others)
    patch.setattr(
        build,
        "open_gemm",
        lambda library, has_blocks: Gemm(library, lt, GemmTimings(None), has_blocks and multiplies_blocks),
    )
    patch.setattr(build, "open_device_group", lambda comm, members: HostGroup(comm.split(members)))
    patch.setattr(tuning, "GemmTuner", DryTuner)
    return device
