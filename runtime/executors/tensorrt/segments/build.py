# SPDX-License-Identifier: Apache-2.0
"""Putting an executor of segments together: the CUDA executor, whose model is a program that engines compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phalanx.runtime.executors.cuda.build import create_lowered_executor
from phalanx.runtime.executors.cuda.executor import CudaExecutor
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.segments.decode import segmented
from phalanx.runtime.executors.tensorrt.segments.plans import digest, profile_sizes, read_plans
from phalanx.runtime.executors.tensorrt.segments.programs import rank_programs
from phalanx.runtime.executors.tensorrt.segments.runner import DeviceSegments
from phalanx.runtime.models import Model
from phalanx.runtime.models.base import Pass

__all__ = ["create_segment_executor"]


def create_segment_executor(
    spec: RankSpec, library: TensorRT8, path: Path, shape: NetworkShape
) -> tuple[CudaExecutor, int]:
    """Load this rank's shard onto its GPU and engines for it; also the longest sequence. *Collective over the replica.*

    Args:
        path: this rank's plans, which were built for ``shape``.

    Raises:
        ConfigError: no GPU for this rank, or the memory does not suffice.
        CheckpointError: weights are missing, superfluous or of the wrong shape.
        ExecutorError: TensorRT cannot load the engines.
    """
    programs = rank_programs(spec.model, spec.config, spec.checkpoint.formats, spec.topology)
    names = {segment: digest(segment) for segment in programs.segments}
    plans = read_plans(path, names.values())
    sizes = profile_sizes(shape.max_num_seqs, shape.max_prefill_tokens)

    def lower(model: Model) -> Pass[Any]:
        by_segment = {segment: plans[name] for segment, name in names.items()}
        runner = DeviceSegments(library, by_segment, programs.calls, sizes)
        return segmented(model.decode, programs, runner)

    return create_lowered_executor(spec, lower, library.name)
