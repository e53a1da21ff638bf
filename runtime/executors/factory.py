"""From the operator's choice to an executor: which engine, how large a cache, which weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import local_kv_heads
from phalanx.runtime.config import GPU_MAX_NUM_SEQS, EngineConfig, ModelConfig
from phalanx.runtime.executors.base import Executor
from phalanx.runtime.executors.numpy.executor import CAPABILITIES, CacheShape, NumpyExecutor
from phalanx.runtime.executors.rank_spec import RankSpec

__all__ = ["choose_engine", "create_executor", "longest_sequence", "with_default_sizes"]

_ROUNDING = {"auto": None, "float32": None, "bfloat16": "BF16", "float16": "F16"}

NUMPY_CACHE_FRACTION = 0.3
"""Share of the available memory that the NumPy caches of all ranks of a node may take together."""


def choose_engine(requested: str) -> str:
    """``auto`` is cuda where a GPU and CuPy are, else numpy; never tensorrt, whose engines are built on purpose."""
    if requested != "auto":
        return requested
    from phalanx.kernels.device import gpu_is_available

    return "cuda" if gpu_is_available() else "numpy"


def with_default_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `EngineConfig`, with ``max_num_seqs`` by the engine that will run where the operator gave none."""
    engine = choose_engine(options.get("engine", "auto"))
    return {**({"max_num_seqs": GPU_MAX_NUM_SEQS} if engine == "cuda" else {}), **options}


def create_executor(spec: RankSpec) -> tuple[Executor, int]:
    """Load this rank's shard into an executor; also the longest sequence that it can hold. *Collective over the replica.*

    Raises:
        ConfigError: the engine cannot run the model, or the cache cannot hold one sequence.
        CheckpointError: weights are missing, superfluous or of the wrong shape.
    """
    engine = choose_engine(spec.options.engine)
    if engine == "cuda":
        from phalanx.runtime.executors.cuda.build import create_cuda_executor

        return create_cuda_executor(spec)
    if engine == "tensorrt":
        from phalanx.runtime.executors.tensorrt.executor import create_trt_executor

        return create_trt_executor(spec)
    return _create_numpy_executor(spec)


def _create_numpy_executor(spec: RankSpec) -> tuple[Executor, int]:
    config, options, topology = spec.config, spec.options, spec.topology
    CAPABILITIES.check(config, spec.dtype)
    sink = NumpySink(rounding=_ROUNDING[options.dtype])
    load_weights(
        spec.checkpoint.source, spec.weights, spec.tp_rank, spec.tp_size, sink,
        ignored=spec.model.ignored_tensors, all_specs=spec.model.weights(config),
    )  # fmt: skip
    num_blocks = options.num_kv_blocks or _numpy_blocks(spec)
    num_blocks = int(spec.comm.all_gather(np.array([num_blocks])).min())
    max_len = longest_sequence(config, options, num_blocks)
    cache = CacheShape(num_blocks, options.block_size, options.max_num_seqs, max_len)
    return NumpyExecutor(spec.model, config, sink.weights, topology, spec.comm, cache), max_len


def longest_sequence(config: ModelConfig, options: EngineConfig, num_blocks: int) -> int:
    """Most tokens of one sequence, prompt and output: what was asked for, else what model and cache allow.

    Raises:
        ConfigError: more was asked for than the model's positions or the cache allow.
    """
    capacity = num_blocks * options.block_size
    if options.max_model_len is None:
        return min(config.max_positions, capacity)
    if options.max_model_len > config.max_positions:
        raise ConfigError(
            f"--max-model-len={options.max_model_len} is beyond the {config.max_positions} positions of "
            f"{config.architecture}; use at most {config.max_positions}"
        )
    if options.max_model_len > capacity:
        raise ConfigError(
            f"--max-model-len={options.max_model_len} does not fit the cache of {num_blocks} blocks x {options.block_size} "
            f"= {capacity} tokens; use at most {capacity}, or more --num-kv-blocks"
        )
    return options.max_model_len


def _numpy_blocks(spec: RankSpec) -> int:
    """Blocks for max_num_seqs sequences of full length, within this rank's share of the available memory."""
    config, options = spec.config, spec.options
    heads = local_kv_heads(config.num_kv_heads, spec.tp_rank, spec.tp_size).size
    block_bytes = 2 * len(spec.layers) * heads * config.head_dim * options.block_size * 4
    length = min(options.max_model_len or config.max_positions, config.max_positions)
    wanted = options.max_num_seqs * -(-length // options.block_size)
    share = _available_bytes() * NUMPY_CACHE_FRACTION / spec.topology.layout.world_size
    return max(1, min(wanted, int(share // block_bytes)))


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
