# SPDX-License-Identifier: Apache-2.0
"""Putting a TensorRT executor together: an engine that was built before or is built now, and its session."""

from __future__ import annotations

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.tensorrt.executor import TrtExecutor
from phalanx.runtime.executors.tensorrt.loading import open_session
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES

__all__ = ["create_trt_executor"]


def create_trt_executor(spec: RankSpec) -> tuple[TrtExecutor, int]:
    """Load this rank's engine, building it if there is none yet; also the longest sequence. *Collective over the replica.*

    Raises:
        ConfigError: no TensorRT, no GPU that it supports, or engines that do not fit what is asked for.
        CheckpointError: the checkpoint does not fit the model.
    """
    CAPABILITIES.check(spec.model, spec.config, spec.dtype)
    CAPABILITIES.check_formats(spec.config, spec.declared)
    if spec.options.quantize != "none" or spec.options.kv_cache_dtype == "fp8":
        raise ConfigError(
            f"the tensorrt engine cannot run --quantize={spec.options.quantize} --kv-cache-dtype={spec.options.kv_cache_dtype}; "
            "use --engine cuda or numpy for fp8"
        )
    session, shape = open_session(spec)
    pipeline = spec.comm.split(spec.topology.pp_group)
    return TrtExecutor(session, shape, spec.topology, pipeline), spec.options.max_model_len or shape.max_model_len
