# SPDX-License-Identifier: Apache-2.0
"""`Ops` that write layers into a TensorRT network instead of computing: the same models, lowered.

Between operations a tensor is ``[T, D]`` in the compute type, T = B N tokens of B sequences with N tokens each (decoding: N = 1;
prefill: B = 1), so that a matrix product is one GEMM and not one per sequence. Only attention sees the batch axis. Rotation
and scaling are done in float32, as the reference does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.parallel.sharding import Span
from phalanx.runtime.attention import AttentionSpec, LocalHeads
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.executors.capabilities import ALL_ENGINES, ANY, Capabilities
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.layers import Constants, TrtLayers
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.ops import Ops
from phalanx.runtime.rope import rotary_table

__all__ = ["CAPABILITIES", "StepTensors", "TrtOps"]

_FLOAT32 = np.dtype(np.float32)

_HIDDEN = -60000.0
"""Added to the score of a position that must not be seen: within float16, and its exponential is 0 in every type."""


CAPABILITIES = Capabilities(
    engine="tensorrt",
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    features={**ALL_ENGINES, "logits.soft_cap": ANY, "sigmoid_gate": ANY},
)
"""TensorRT's attention layer has a mask, but neither a soft cap nor ALiBi's biases."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The inputs of a network that stand for the step.

    Attributes:
        token_ids: ``[B, N]`` int32; None after the first pipeline stage.
        positions: ``[B, N]`` int32.
        write_indices: ``[B]`` int32, where each sequence's new keys and values go in its slot.
        slot_length: positions that a slot holds.
    """

    token_ids: ITensor | None
    positions: ITensor
    write_indices: ITensor
    slot_length: int


class TrtOps(TrtLayers, Ops[ITensor]):
    """One rank's operations as layers of ``graph``.

    Args:
        weights: this rank's shard in the compute type; kept alive by the graph.
        dtype: compute type.
        vocabulary: rows of the vocabulary that this rank holds.
        caches: layer -> (keys, values), network inputs ``[B, K, P, C]``; updated ones are left in `updated_caches`.
        rank, num_ranks: place in the tensor-parallel group.
    """

    def __init__(
        self, graph: Graph, weights: Weights[Array], dtype: np.dtype[Any], vocabulary: Span,
        caches: Mapping[int, tuple[ITensor, ITensor]], step: StepTensors, rank: int, num_ranks: int,
    ) -> None:  # fmt: skip
        self._graph, self._vocabulary, self._caches = graph, vocabulary, caches
        self._step, self._rank, self._num_ranks = step, rank, num_ranks
        self.updated_caches: dict[int, tuple[ITensor, ITensor]] = {}
        shape = graph.shape(step.positions)
        self._num_seqs, self._seq_tokens = graph.extent(shape, 0), graph.extent(shape, 1)
        num_tokens = graph.binary("PROD", self._num_seqs, self._seq_tokens)
        super().__init__(graph, Constants(graph, weights, dtype), dtype, num_tokens)
        self._flat_positions = graph.reshape(step.positions, (-1,))
        self._masks: dict[int, ITensor] = {}
        self._rotary: dict[RopeConfig, tuple[ITensor, ITensor]] = {}

    # Embeddings

    def embedding(self, name: str, scale: float = 1.0) -> ITensor:
        graph = self._graph
        assert self._step.token_ids is not None, "only the first pipeline stage embeds tokens"
        ids = graph.reshape(self._step.token_ids, (-1,))
        table = self._parameters.matrix(name)
        rows = graph.gather(table, ids) if self._num_ranks == 1 else self.all_reduce(self._local_rows(table, ids))
        return (
            rows if scale == 1.0 else self._in_float32(rows, lambda x: graph.binary("PROD", x, graph.scalar(scale, 2)))
        )

    def _local_rows(self, table: ITensor, ids: ITensor) -> ITensor:
        """Rows of the tokens that this rank holds, zero for the others."""
        graph, span = self._graph, self._vocabulary
        first, zero = (
            graph.constant(np.array([span.start], np.int32)),
            graph.constant(np.array([0], np.int32)),
        )
        count = graph.constant(np.array([span.stop - span.start], np.int32))
        local = graph.binary("SUB", ids, first)
        below = graph.binary("LESS", local, zero)
        mine = graph.binary("AND", graph.unary("NOT", below), graph.binary("LESS", local, count))
        rows = graph.gather(table, graph.select(mine, local, zero))
        nothing = graph.constant(np.zeros((1, 1), self._dtype))
        return graph.select(graph.reshape(mine, (-1, 1)), rows, nothing)

    def position_embedding(self, x: ITensor, name: str) -> ITensor:
        return self.add(x, self._graph.gather(self._parameters.matrix(name), self._flat_positions))

    def all_reduce(self, x: ITensor) -> ITensor:
        return x if self._num_ranks == 1 else self._graph.all_reduce(x, self._num_ranks)

    # Attention

    def attention(self, qkv: ITensor, name: str, layer: int, spec: AttentionSpec) -> ITensor:
        graph, heads = self._graph, LocalHeads.of(spec, self._rank, self._num_ranks)
        counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        query, key, value = self._split(qkv, counts, heads.head_dim)
        query = self._in_float32(
            query, lambda x: graph.binary("PROD", self._rotate(x, spec.rope), graph.scalar(spec.scale, 4))
        )
        if spec.rope is not None:
            key = self._in_float32(key, lambda x: self._rotate(x, spec.rope))
        keys, values = (
            graph.update_cache(cache, update, self._step.write_indices)
            for cache, update in zip(self._caches[layer], (key, value), strict=True)
        )
        self.updated_caches[layer] = (keys, values)
        attended = graph.attention(query, keys, values, self._mask(spec.window))
        return graph.merge_heads(attended, heads.num_heads * heads.head_dim)

    def _split(self, qkv: ITensor, counts: tuple[int, ...], head_dim: int) -> list[ITensor]:
        """The packed product by ``counts`` of heads: ``[T, (H + 2K) C] -> [B, n, N, C]`` each."""
        parts, first = [], 0
        for count in counts:
            key = ("heads", count, head_dim)
            if key not in self._shapes:
                self._shapes[key] = self._graph.extents(self._num_seqs, self._seq_tokens, count, head_dim)
            columns = self._columns(qkv, first * head_dim, count * head_dim)
            parts.append(self._graph.split_heads(columns, self._shapes[key]))
            first += count
        return parts

    def _rotate(self, x: ITensor, rope: RopeConfig | None) -> ITensor:
        if rope is None:
            return x
        if rope not in self._rotary:
            cos, sin = rotary_table(rope, self._step.slot_length)
            self._rotary[rope] = (self._table(cos), self._table(sin))
        return self._graph.rotate(x, *self._rotary[rope], self._step.positions, rope.rotary_dim, rope.interleaved)

    def _table(self, values: Array) -> ITensor:
        return self._graph.constant(np.ascontiguousarray(values, np.float32))

    def _mask(self, window: int) -> ITensor:
        """``[B, 1, N, P]``, added to scores: 0 where a query sees a position of its slot; one for all layers of a kind."""
        if window not in self._masks:
            graph = self._graph
            own = graph.reshape(self._step.positions, graph.extents(self._num_seqs, 1, self._seq_tokens, 1))
            slot = graph.constant(np.arange(self._step.slot_length, dtype=np.int32).reshape(1, 1, 1, -1))
            visible = graph.unary("NOT", graph.binary("GREATER", slot, own))
            if window:
                oldest = graph.binary("SUB", own, graph.constant(np.full((1, 1, 1, 1), window, np.int32)))
                visible = graph.binary("AND", visible, graph.binary("GREATER", slot, oldest))
            nothing, hidden = (graph.constant(np.full((1, 1, 1, 1), value, self._dtype)) for value in (0.0, _HIDDEN))
            self._masks[window] = graph.select(visible, nothing, hidden)
        return self._masks[window]
