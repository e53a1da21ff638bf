# SPDX-License-Identifier: Apache-2.0
"""One rank's network: the model's own functions run over `TrtOps`, framed by inputs, outputs and profiles.

    inputs   token_ids [B, N] (first stage) or hidden [B, N, D]; positions [B, N]; write_indices [B];
             logit_rows [R] (last stage); keys.<layer>, values.<layer> [B, K, P, C]
    outputs  hidden_out [T, D], residual added in (all but the last stage), or logits [R, V] float32, of each row the most
             probable token_out [R] and the sum logit_sum [R], which tells whether all are finite (last stage);
             keys.<layer>.updated, values.<layer>.updated, bound to the addresses of their inputs

Two profiles: decoding takes one token of each of B slots, prefill N tokens of one slot. A prompt chunk is bound straight to its
slot's memory, so nothing is padded and a chunk of any length writes exactly what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from phalanx.checkpoints.dtypes import FLOAT_DTYPES, dtype_from_config
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Topology
from phalanx.runtime.attention import LocalHeads
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.tensorrt.ops import StepTensors, TrtOps
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.memory import LOGIT_ROWS
from phalanx.runtime.models import Model
from phalanx.runtime.models.base import vocabulary_shard

__all__ = [
    "DECODE_PROFILE",
    "PREFILL_PROFILE",
    "NetworkShape",
    "ProfileShapes",
    "RankNetwork",
    "cache_shapes",
    "write_network",
]

DECODE_PROFILE, PREFILL_PROFILE = 0, 1
_SLOT_STEP = 128
"""Positions: 256 bytes even for one head of one float16."""

_INT32 = np.dtype(np.int32)

ProfileShapes: TypeAlias = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> smallest, most frequent and largest shape."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Sizes that an engine is built for.

    Attributes:
        dtype: compute type, ``float32``, ``bfloat16`` or ``float16``.
        max_num_seqs: most slots.
        max_model_len: most positions that a sequence uses.
        max_prefill_tokens: longest prompt chunk in one pass; longer ones are cut.

    Raises:
        ConfigError: a size is below 1.
    """

    dtype: str
    max_num_seqs: int
    max_model_len: int
    max_prefill_tokens: int

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of an engine is below 1; use at least 1")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Compute type as a NumPy type."""
        return FLOAT_DTYPES[dtype_from_config(self.dtype)]

    @property
    def slot_length(self) -> int:
        """Positions in a slot, P: rounded up, so that each slot's memory starts at an address that TensorRT accepts."""
        return -(-self.max_model_len // _SLOT_STEP) * _SLOT_STEP

    @property
    def max_prefill_logit_rows(self) -> int:
        """Maximum number of rows of a prefill pass that get logits: bounds the logits buffer at large vocabularies."""
        return min(self.max_prefill_tokens + 1, LOGIT_ROWS)

    @property
    def max_logit_rows(self) -> int:
        """Maximum number of rows of any pass that get logits."""
        return max(self.max_num_seqs, self.max_prefill_logit_rows)


@dataclass(frozen=True, slots=True)
class RankNetwork:
    """A network and what an engine built from it needs. Keep it until the engine is built: the graph owns the weights.

    Attributes:
        profiles: shapes of the inputs, `DECODE_PROFILE` first.
    """

    graph: Graph
    profiles: tuple[ProfileShapes, ...]


def cache_shapes(
    model: Model, config: ModelConfig, topology: Topology, shape: NetworkShape
) -> dict[str, tuple[int, int, int]]:
    """Cache inputs of a stage and the extents ``[K local, P, C]`` of one slot; their outputs end in ``.updated``."""
    shapes = {}
    for layer in model.stages(config, topology.layout.pp)[topology.stage]:
        heads = LocalHeads.of(model.decode.attention(config, layer), topology.tp_rank, topology.layout.tp)
        for kind in ("keys", "values"):
            shapes[f"{kind}.{layer}"] = (heads.num_kv_heads, shape.slot_length, heads.head_dim)
    return shapes


def write_network(
    graph: Graph,
    model: Model,
    config: ModelConfig,
    weights: Weights[Array],
    topology: Topology,
    shape: NetworkShape,
) -> RankNetwork:
    """Write one rank's network into the empty ``graph``.

    Raises:
        ConfigError: the model has a feature that a network cannot express.
        ExecutorError: TensorRT refused a layer.
    """
    layers = model.stages(config, topology.layout.pp)[topology.stage]
    slots = cache_shapes(model, config, topology, shape)
    hidden, step = _step_inputs(graph, config, topology, shape)
    caches = {name: graph.input(name, shape.numpy_dtype, (-1, *extents)) for name, extents in slots.items()}
    ops = TrtOps(
        graph, weights, shape.numpy_dtype, vocabulary_shard().span(config.vocab_size, topology.tp_rank, topology.layout.tp),
        {layer: (caches[f"keys.{layer}"], caches[f"values.{layer}"]) for layer in layers}, step, topology.tp_rank,
        topology.layout.tp,
    )  # fmt: skip
    received = None if hidden is None else graph.reshape(hidden, (-1, config.hidden_size))
    x, residual = model.decode.run(ops, config, layers, received)
    x = x if residual is None else ops.add(x, residual)
    if topology.is_last_stage:
        _write_logits(graph, model, config, ops, x, topology.layout.tp)
    else:
        graph.output("hidden_out", x)
    for layer, updated in ops.updated_caches.items():
        for kind, tensor in zip(("keys", "values"), updated, strict=True):
            graph.output(f"{kind}.{layer}.updated", tensor)
    return RankNetwork(graph, _profiles(config, topology, shape, slots))


def _step_inputs(
    graph: Graph, config: ModelConfig, topology: Topology, shape: NetworkShape
) -> tuple[ITensor | None, StepTensors]:
    """What enters the stage, None on the first, and the step."""
    token_ids = hidden = None
    if topology.is_first_stage:
        token_ids = graph.input("token_ids", _INT32, (-1, -1))
    else:
        hidden = graph.input("hidden", shape.numpy_dtype, (-1, -1, config.hidden_size))
    positions = graph.input("positions", _INT32, (-1, -1))
    write_indices = graph.input("write_indices", _INT32, (-1,))
    return hidden, StepTensors(token_ids, positions, write_indices, shape.slot_length)


def _write_logits(graph: Graph, model: Model, config: ModelConfig, ops: TrtOps, x: ITensor, num_ranks: int) -> None:
    """Logits of the rows asked for, over the whole vocabulary on every rank, and the most probable token of each."""
    rows = graph.gather(x, graph.input("logit_rows", _INT32, (-1,)))
    local = graph.cast(model.decode.head(ops, config, rows, None), np.dtype(np.float32))
    width = local.shape[1]
    if num_ranks > 1:
        stacked = graph.all_gather(local, num_ranks)
        ranks_first = graph.extents(num_ranks, graph.extent(graph.shape(local), 0), width)
        local = graph.swap_outer(graph.reshape(stacked, ranks_first), num_ranks * width)
    num_rows = graph.extent(graph.shape(local), 0)
    logits = graph.columns(local, 0, graph.extents(num_rows, config.vocab_size))
    graph.output("logits", logits)
    graph.output("token_out", graph.largest(logits))
    graph.output("logit_sum", graph.row_sums(logits))


def _profiles(
    config: ModelConfig, topology: Topology, shape: NetworkShape, slots: Mapping[str, tuple[int, ...]]
) -> tuple[ProfileShapes, ...]:
    most, longest = shape.max_num_seqs, shape.max_prefill_tokens
    decode = ((1, max(1, most // 2), most), (1, 1, 1), (1, max(1, most // 2), most))
    prefill = ((1, 1, 1), (1, max(1, longest // 2), longest), (1, 1, shape.max_prefill_logit_rows))
    return tuple(_profile(config, topology, *extents, slots) for extents in (decode, prefill))


def _profile(
    config: ModelConfig, topology: Topology, seqs: tuple[int, ...], tokens: tuple[int, ...], rows: tuple[int, ...],
    slots: Mapping[str, tuple[int, ...]],
) -> ProfileShapes:  # fmt: skip
    def three(*shapes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return shapes[0], shapes[1], shapes[2]

    grid = three(*zip(seqs, tokens, strict=True))
    shapes: ProfileShapes = {"positions": grid, "write_indices": three(*((n,) for n in seqs))}
    if topology.is_first_stage:
        shapes["token_ids"] = grid
    else:
        shapes["hidden"] = three(*((*pair, config.hidden_size) for pair in grid))
    if topology.is_last_stage:
        shapes["logit_rows"] = three(*((n,) for n in rows))
    return shapes | {name: three(*((n, *extents) for n in seqs)) for name, extents in slots.items()}
