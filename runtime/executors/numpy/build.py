# SPDX-License-Identifier: Apache-2.0
"""Putting a NumPy executor together: weights, and a cache sized by the memory of the host."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from phalanx.checkpoints.formats import ALL_DENSE
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.executors.fit import available_host_bytes, refuse_what_cannot_fit
from phalanx.runtime.executors.numpy.executor import NumpyExecutor
from phalanx.runtime.executors.numpy.ops import CAPABILITIES
from phalanx.runtime.executors.quantised_loading import quantised
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.sizes import longest_requested, longest_sequence
from phalanx.runtime.executors.weights import Weight
from phalanx.runtime.memory import kv_block_bytes
from phalanx.runtime.step import StepLimits

__all__ = ["create_numpy_executor"]

_ROUNDING = {"auto": None, "float32": None, "bfloat16": "BF16", "float16": "F16"}

CACHE_FRACTION = 0.3
"""Share of the available memory that the caches of all ranks of a host may take together."""


def create_numpy_executor(spec: RankSpec) -> tuple[NumpyExecutor, int]:
    """Load this rank's shard; also the longest sequence that its cache can hold. *Collective over the replica.*

    Raises:
        ConfigError: the engine cannot run the model, or the cache cannot hold one sequence.
        CheckpointError: weights are missing, superfluous or of the wrong shape.
    """
    config, options, topology = spec.config, spec.options, spec.topology
    CAPABILITIES.check(spec.model, config, spec.dtype)
    formats, kv_scales = spec.quantized, spec.kv_scales
    share = available_host_bytes() // launch_info().local_size
    refuse_what_cannot_fit(spec, ALL_DENSE, 4, share, "this host")  # whatever the format, the products are of float32
    weights = spec.load(NumpySink(rounding=_ROUNDING[options.dtype]))
    weights = weights.converted(lambda weight: _operand(quantised(weight, formats)))
    num_blocks = options.num_kv_blocks or _num_blocks(spec)
    num_blocks = int(spec.comm.all_gather(np.array([num_blocks])).min())
    max_len = longest_sequence(config, options, num_blocks)
    limits = StepLimits(
        options.max_num_seqs, options.max_num_batched_tokens, max_len, options.block_size, spec.config.vocab_size
    )
    return NumpyExecutor(spec.model, config, weights, topology, spec.comm, limits, num_blocks, kv_scales), max_len


def _operand(weight: Weight[Array]) -> Weight[Array]:
    """The same weight with what the format's product takes.

    Raises:
        CheckpointError: its components contradict each other.
    """
    try:
        return replace(weight, components=weight.format.operand(weight.components))
    except CheckpointError as error:
        raise CheckpointError(f"{weight.name}: {error}") from None


def _num_blocks(spec: RankSpec) -> int:
    """Blocks for max_num_seqs sequences of full length, within this rank's share of the available memory."""
    config, options = spec.config, spec.options
    block_bytes = kv_block_bytes(spec.attention.values(), spec.tp_rank, spec.tp_size, options.block_size, itemsize=4)
    wanted = options.max_num_seqs * -(-longest_requested(config, options.max_model_len) // options.block_size)
    share = _available_bytes() * CACHE_FRACTION / spec.topology.layout.world_size
    return max(1, min(wanted, int(share // block_bytes)))


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
