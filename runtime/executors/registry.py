# SPDX-License-Identifier: Apache-2.0
"""Every engine by name: how one rank's executor is built, and what else differs between engines outside the executors.

A new engine is an entry here and a package next to this file. Nothing is imported until an engine is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from phalanx.runtime.config import GPU_MAX_NUM_SEQS, EngineConfig

if TYPE_CHECKING:
    from phalanx.runtime.executors.base import Executor
    from phalanx.runtime.executors.rank_spec import RankSpec

__all__ = ["ENGINES", "EngineEntry", "choose_engine", "create_executor", "engine_reason", "with_default_sizes"]

DEFAULT_MAX_NUM_SEQS = EngineConfig().max_num_seqs

_ALWAYS = ("Python", "packages", "ranks")
_DEVICES = ("versions", "GPUs", "GPU mapping", "compute capability", "NCCL", "NCCL all-reduce")


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """One engine.

    Attributes:
        build: loads this rank's shard into an executor and returns it with the longest sequence that it can hold.
            *Collective over the replica.*
        checks: names of the checks of ``launch.doctor`` that must pass, as far as they were run: a single rank has no
            NCCL check.
        max_num_seqs: default of `EngineConfig.max_num_seqs`.
    """

    build: Callable[[RankSpec], tuple[Executor, int]]
    checks: tuple[str, ...]
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS


def _build_numpy(spec: RankSpec) -> tuple[Executor, int]:
    from phalanx.runtime.executors.numpy.build import create_numpy_executor

    return create_numpy_executor(spec)


def _build_cuda(spec: RankSpec) -> tuple[Executor, int]:
    from phalanx.runtime.executors.cuda.build import create_cuda_executor

    return create_cuda_executor(spec)


def _build_tensorrt(spec: RankSpec) -> tuple[Executor, int]:
    from phalanx.runtime.executors.tensorrt.build import create_trt_executor

    return create_trt_executor(spec)


ENGINES: Mapping[str, EngineEntry] = MappingProxyType(
    {
        "numpy": EngineEntry(_build_numpy, _ALWAYS),
        "cuda": EngineEntry(
            _build_cuda, (*_ALWAYS, *_DEVICES, "kernel compiler", "kernels", "cuBLASLt"), GPU_MAX_NUM_SEQS
        ),
        "tensorrt": EngineEntry(_build_tensorrt, (*_ALWAYS, *_DEVICES, "TensorRT")),
    }
)


def choose_engine(requested: str) -> str:
    """``auto`` is cuda if a GPU and CuPy are available, else numpy; never tensorrt, whose engines take minutes to build."""
    if requested != "auto":
        return requested
    from phalanx.kernels.device import gpu_is_available

    return "cuda" if gpu_is_available() else "numpy"


def engine_reason(requested: str) -> str:
    """Why `choose_engine` chose what it chose, for people."""
    if requested != "auto":
        return "asked for"
    from phalanx.kernels.device import driver_is_installed, gpu_is_available

    if gpu_is_available():
        return "a GPU and CuPy are here"
    if driver_is_installed():
        return "there is an NVIDIA driver, but CuPy is missing or sees no GPU; phalanx doctor says more"
    return "there is no NVIDIA driver here"


def with_default_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `EngineConfig`, with the default ``max_num_seqs`` of the engine that will run if none is given."""
    entry = ENGINES.get(choose_engine(options.get("engine", "auto")))
    return {**({} if entry is None else {"max_num_seqs": entry.max_num_seqs}), **options}


def create_executor(spec: RankSpec) -> tuple[Executor, int]:
    """Load this rank's shard into an executor; also the longest sequence that it can hold. *Collective over the replica.*

    Raises:
        ConfigError: the engine cannot run the model, or the cache cannot hold one sequence.
        CheckpointError: weights are missing, superfluous or of the wrong shape.
    """
    return ENGINES[choose_engine(spec.options.engine)].build(spec)
