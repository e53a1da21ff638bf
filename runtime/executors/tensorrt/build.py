# SPDX-License-Identifier: Apache-2.0
"""Putting a TensorRT executor together: an engine that was built before or is built now, and its session.

TensorRT 8.6, which has no layers for attention, computes segments within the CUDA executor.
"""

from __future__ import annotations

from phalanx.runtime.executors.cuda.executor import CudaExecutor
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.tensorrt.builder import check_model
from phalanx.runtime.executors.tensorrt.device import compute_capability
from phalanx.runtime.executors.tensorrt.executor import TrtExecutor
from phalanx.runtime.executors.tensorrt.formats import check_cache, check_formats, network_weights
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.loading import find_engine, open_device, open_session
from phalanx.runtime.executors.tensorrt.segments.build import create_segment_executor

__all__ = ["create_trt_executor"]


def create_trt_executor(spec: RankSpec) -> tuple[TrtExecutor | CudaExecutor, int]:
    """Load this rank's engine, building it if there is none yet; also the longest sequence. *Collective over the replica.*

    Raises:
        ConfigError: no TensorRT, no GPU that it supports, or engines that do not fit what is asked for.
        CheckpointError: the checkpoint does not fit the model.
    """
    library = load_tensorrt()
    check_model(library, spec.model, spec.config, spec.dtype)
    capability = compute_capability()
    weights = network_weights(spec.model, spec.config, spec.checkpoint.formats, spec.options.quantize)
    check_formats(library, spec.config, weights, () if capability is None else (capability,))
    check_cache(library, spec.has_fp8_cache, spec.dtype)
    if isinstance(library, TensorRT8):
        _, _, capability = open_device(library)
        path, request = find_engine(library, spec, capability)
        return create_segment_executor(spec, library, path, request.shape)
    session, shape = open_session(spec, library)
    pipeline = spec.comm.split(spec.topology.pp_group)
    return TrtExecutor(session, shape, spec.topology, pipeline), spec.options.max_model_len or shape.max_model_len
