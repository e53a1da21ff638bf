# SPDX-License-Identifier: Apache-2.0
"""What every part of one rank's executor is built from, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.checkpoints.dummy import DummySource
from phalanx.checkpoints.formats import FormatPlan, FormattedWeight
from phalanx.checkpoints.quantization.held import held_formats
from phalanx.checkpoints.quantization.kv_scales import attention_module, read_kv_scales
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.liveness.progress import RankProgress
from phalanx.parallel.sharding import local_kv_heads
from phalanx.parallel.topology import Topology
from phalanx.runtime.attention import AttentionSpec
from phalanx.runtime.config import ComputeDType, EngineConfig, ModelConfig
from phalanx.runtime.executors.quantised_loading import formats_while_loading
from phalanx.runtime.executors.weights import Array, CollectingSink, Weights, load_stage, stage_weights
from phalanx.runtime.models import Model
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.quantisation import check_cache_dtype, has_fp8_cache

__all__ = ["RankSpec"]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What one rank serves, how, and its place among the ranks of its replica.

    Attributes:
        model: the family; ``config`` its dimensions, ``checkpoint`` its weights.
        options: what the operator chose.
        topology: this rank's place in the world.
        comm: all ranks of the replica, in order.
        progress: told how many of how many weights are loaded.
    """

    model: Model
    config: ModelConfig
    checkpoint: Checkpoint
    options: EngineConfig
    topology: Topology
    comm: Communicator
    progress: RankProgress = field(default_factory=RankProgress)

    @property
    def dtype(self) -> ComputeDType:
        """Compute type: what was asked for, else the checkpoint's own."""
        return self.config.compute_dtype(self.options.dtype)

    @property
    def layers(self) -> range:
        """Global numbers of the blocks of this rank's stage."""
        return self.model.stages(self.config, self.topology.layout.pp)[self.topology.stage]

    @property
    def attention(self) -> dict[int, AttentionSpec]:
        """What the attention of each of these layers is."""
        return {layer: self.model.decode.attention(self.config, layer) for layer in self.layers}

    @property
    def declared(self) -> list[FormattedWeight]:
        """Weights of this stage with their formats."""
        return stage_weights(self.model, self.config, self.checkpoint.formats, self.topology)

    @property
    def quantized(self) -> dict[str, RowCodes]:
        """``--quantize``: the formats of weights that are stored as floats and quantised while they are loaded.

        Raises:
            ConfigError: the checkpoint is quantised already.
        """
        return formats_while_loading(self.declared, self.options.quantize)

    @property
    def held_formats(self) -> FormatPlan:
        """Formats of weights in memory, after `quantized`."""
        use = use_of(self.model, self.config)
        return held_formats(self.checkpoint.formats, self.options.quantize, use.experts, use.gates, self.tp_size)

    @property
    def has_fp8_cache(self) -> bool:
        """Whether keys and values are to be held as fp8, by the operator's choice or the checkpoint's.

        Raises:
            ConfigError: the cache's type is neither fp8 nor the compute type.
        """
        check_cache_dtype(self.options, self.dtype)
        return has_fp8_cache(self.checkpoint.formats, self.options)

    @property
    def kv_scales(self) -> dict[int, NDArray[np.float32]] | None:
        """For each layer of this stage ``[2, K local]`` scales of an fp8 cache, keys and values; None = a cache of plain values.

        Raises:
            ConfigError: as `has_fp8_cache`; or a model file calls queries, keys and values otherwise than ``layers.<number>.qkv``.
            CheckpointError: the checkpoint promises scales that it lacks.
        """
        if not self.has_fp8_cache:
            return None
        numbers = {layer: spec.num_kv_heads for layer, spec in self.attention.items()}
        heads = {layer: local_kv_heads(number, self.tp_rank, self.tp_size) for layer, number in numbers.items()}
        if not self.checkpoint.formats.has_kv_scales or isinstance(self.checkpoint.source, DummySource):
            return {layer: np.ones((2, span.size), np.float32) for layer, span in heads.items()}
        modules = {
            weight.spec.owner: [attention_module(name) for name in weight.spec.parts[0].names]
            for weight in self.declared
            if weight.spec.kind == "weight"
        }
        if missing := [name for layer in heads if (name := f"layers.{layer}.qkv") not in modules]:
            raise ConfigError(
                f"{missing[0]} is no weight of {self.model.architecture}, but the checkpoint's scales of the cache are found by it; call "
                "queries, keys and values so"
            )
        return {
            layer: np.ascontiguousarray(
                read_kv_scales(self.checkpoint.source, modules[f"layers.{layer}.qkv"], numbers[layer])[
                    :, span.start : span.stop
                ]
            )
            for layer, span in heads.items()
        }

    def load(self, sink: CollectingSink[Array]) -> Weights[Array]:
        """Load this rank's weights into ``sink``. Raises as `load_stage`."""
        checkpoint = self.checkpoint
        return load_stage(
            checkpoint.source, self.model, self.config, checkpoint.formats, self.topology, sink, self.progress.advance
        )  # fmt: skip

    @property
    def tp_rank(self) -> int:
        """Place within the tensor-parallel group."""
        return self.topology.tp_rank

    @property
    def tp_size(self) -> int:
        """Ranks of the tensor-parallel group."""
        return self.topology.layout.tp
