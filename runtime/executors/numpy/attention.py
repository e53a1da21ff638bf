# SPDX-License-Identifier: Apache-2.0
"""Paged attention in NumPy.

Each layer keeps keys and values as ``[K, N, P, C]``: head first, so that the history of a sequence whose blocks are
consecutive is a view ``[K, n P, C]`` that BLAS reads in place. Scattered blocks are gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.numbers import E4M3_MAX, to_codes
from phalanx.runtime.attention import AttentionSpec, LocalHeads
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.executors.numpy.scores import AttentionKind, rotate, softmax
from phalanx.runtime.executors.numpy.threads import Threads
from phalanx.runtime.rope import rotary_table
from phalanx.runtime.step import BatchState, StepPlan

__all__ = ["NumpyAttention"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
MIN_GATHERED_DECODES = 16
"""From this many one-token sequences on, one gather over all of them beats a Python loop over sequences."""
QUERY_TILE = 128
"""Queries of a prompt chunk that are computed at once, each tile over the history that its last query sees."""


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence's share of a step, or a tile of its queries.

    Attributes:
        rows: its queries among the step's rows.
        start, length: position of the first query, and one past that of the last.
        blocks: of the whole sequence, in order.
        whole: the sequence's whole share of the step, for attention that looks ahead.
        num_prefix: its leading tokens that see one another, where the attention has a prefix.
    """

    rows: slice
    start: int
    length: int
    blocks: Int32Array
    whole: tuple[slice, int]
    num_prefix: int


@dataclass(frozen=True, slots=True)
class _Layer:
    """Tensors of one call: queries ``[T, H, C]``, scaled; where keys and values come from; output ``[T, H, C]``.

    Keys and values are pages ``[K, N, P, C]``, or without a cache the step's own rows ``[K, T, C]``.
    """

    kind: AttentionKind
    queries: Float32Array
    keys: Float32Array
    values: Float32Array
    out: Float32Array


class NumpyAttention:
    """Key/value cache of one rank's layers, and attention over it.

    Args:
        specs: what each layer's attention is, by the layer's number in the whole model.
        num_blocks, block_size: N and P.
        rank, size: place in the tensor-parallel group.
        max_len: longest sequence, for the rotary tables.
        threads: pool that runs the tiles of prompt chunks.
        kv_scales: for each layer ``[2, K]`` float32 scales of keys and values, which are then rounded to fp8 codes.
    """

    def __init__(
        self, specs: Mapping[int, AttentionSpec], num_blocks: int, block_size: int, rank: int, size: int, max_len: int,
        threads: Threads, kv_scales: Mapping[int, Float32Array] | None = None,
    ) -> None:  # fmt: skip
        self._kv_scales, self.num_saturated = kv_scales, 0
        self._rank, self._size = rank, size
        self._block_size, self._max_len, self._threads = block_size, max_len, threads
        self._kinds: dict[AttentionSpec, AttentionKind] = {}
        self._rotary: dict[RopeConfig, tuple[Float32Array, Float32Array]] = {}
        self._pages: dict[int, tuple[Float32Array, Float32Array]] = {}
        for layer, spec in specs.items():
            if spec.cached:
                heads = self.local_heads(spec)
                shape = (heads.num_kv_heads, num_blocks, block_size, heads.head_dim)
                self._pages[layer] = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._positions = self._num_prefix = np.empty(0, np.int32)
        self._write = (self._positions, self._positions)
        self._sequences: list[_Sequence] = []
        self._tiles: list[_Sequence] = []
        self._num_gathered, self._shares_tiles = 0, False

    def local_heads(self, spec: AttentionSpec) -> LocalHeads:
        """This rank's share of the heads."""
        return self._kind(spec).heads

    def bind(self, plan: StepPlan, state: BatchState) -> None:
        """Prepare for a step whose diffs ``state`` already holds."""
        self._positions, tables = plan.positions, state.block_tables[0]
        row_seq_indices = np.repeat(plan.seq_indices, plan.num_scheduled_tokens)
        num_prefix = state.sampling["num_prefix"][plan.seq_indices]
        self._num_prefix = np.repeat(num_prefix, plan.num_scheduled_tokens)
        self._write = (
            tables[row_seq_indices, self._positions // self._block_size],
            self._positions % self._block_size,
        )
        ends = plan.cu_seqlens
        self._sequences = []
        columns = (plan.seq_indices, plan.starts, plan.num_scheduled_tokens, num_prefix)
        for index, (seq_index, start, count, prefix) in enumerate(zip(*map(np.ndarray.tolist, columns), strict=True)):
            length = start + count
            blocks = tables[seq_index, : -(-length // self._block_size)]
            rows = slice(int(ends[index]), int(ends[index + 1]))
            self._sequences.append(_Sequence(rows, start, length, blocks, (rows, length), prefix))
        self._num_gathered = plan.num_decodes if plan.num_decodes >= MIN_GATHERED_DECODES else 0
        self._tiles = [tile for sequence in self._sequences[self._num_gathered :] for tile in _tiles(sequence)]
        self._shares_tiles = plan.num_tokens > plan.num_seqs  # one query alone is too little for a thread

    def copy_blocks(self, copies: Int32Array) -> None:
        """Copy whole blocks in all layers; ``copies`` as in `StepPlan.copies`."""
        if len(copies):
            _, source, destination = copies.T
            for cache in (cache for pages in self._pages.values() for cache in pages):
                cache[:, destination] = cache[:, source]

    def __call__(self, qkv: Float32Array, layer: int, spec: AttentionSpec) -> Float32Array:
        """``[T, (H + 2K) C local] -> [T, H C local]``; see `phalanx.runtime.ops.Ops.attention`."""
        kind = self._kind(spec)
        heads, kv_heads, dim = kind.heads.num_heads, kind.heads.num_kv_heads, kind.heads.head_dim
        packed = qkv.reshape(len(qkv), heads + 2 * kv_heads, dim)
        if spec.rope is not None:
            self._rotate(packed[:, : heads + kv_heads], spec.rope)
        rows = (packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :])
        keys, values = (side.swapaxes(0, 1) for side in rows)
        if spec.cached:
            keys, values = self._pages[layer]
            for side, pages in enumerate((keys, values)):
                pages[:, *self._write] = self.cached(rows[side], layer, side).swapaxes(0, 1)
        queries = packed[:, :heads] * np.float32(spec.scale)
        out = np.empty((len(qkv), heads, dim), np.float32)
        self._attend_all(_Layer(kind, queries, keys, values, out))
        return out.reshape(len(qkv), heads * dim)

    def _rotate(self, heads: Float32Array, rope: RopeConfig) -> None:
        """Rotate queries and keys ``[T, H + K, C]`` in place."""
        positions = [self._positions]
        if rope.two_dimensional:
            last = np.maximum(self._num_prefix - 1, 0)
            positions = [np.minimum(self._positions, last), np.maximum(self._positions - last, 0)]
        for part, where in enumerate(positions):
            cos, sin = (table[where, None, :] for table in self._tables(rope))
            rotate(heads[..., part * rope.rotary_dim :], cos, sin, rope.interleaved)

    def cached(self, x: Float32Array, layer: int, side: int) -> Float32Array:
        """What the cache is to hold of ``x`` ``[T, K, C]``: itself, or the values of its codes. ``side``: 0 keys, 1 values."""
        if self._kv_scales is None:
            return x
        scale = self._kv_scales[layer][side][:, None]
        inverse = np.float32(1) / scale
        self.num_saturated += int((np.abs(x * inverse) > E4M3_MAX).sum())
        stored: Float32Array = to_codes(x, inverse, "fp8").astype(np.float32) * scale
        return stored

    def _kind(self, spec: AttentionSpec) -> AttentionKind:
        if spec not in self._kinds:
            self._kinds[spec] = AttentionKind.of(spec, self._rank, self._size)
        return self._kinds[spec]

    def _tables(self, rope: RopeConfig) -> tuple[Float32Array, Float32Array]:
        if rope not in self._rotary:
            cos, sin = rotary_table(rope, self._max_len)
            self._rotary[rope] = cos.astype(np.float32), sin.astype(np.float32)
        return self._rotary[rope]

    def _attend_all(self, layer: _Layer) -> None:
        tiles = self._tiles
        if layer.kind.spec.cached:
            self._attend_decodes(layer)
        else:  # gathering reads pages
            tiles = [tile for sequence in self._sequences for tile in _tiles(sequence)]
        if self._shares_tiles:
            self._threads.run([partial(self._attend, tile, layer) for tile in tiles])
        else:
            for tile in tiles:
                self._attend(tile, layer)

    def _attend(self, tile: _Sequence, layer: _Layer) -> None:
        """One tile: scores ``[K, G Tq, L]`` where the G query heads of a key/value head are rows of one product."""
        kind = layer.kind
        group, kv_heads, dim = kind.group, kind.heads.num_kv_heads, kind.heads.head_dim
        count = tile.rows.stop - tile.rows.start
        q = layer.queries[tile.rows].reshape(count, kv_heads, group, dim).transpose(1, 2, 0, 3)
        k, v = (self._history(source, tile, kind.spec) for source in (layer.keys, layer.values))
        length = k.shape[1]
        scores = q.reshape(kv_heads, group * count, dim) @ k.swapaxes(1, 2)
        scores = scores.reshape(kv_heads, group, count, length)
        query_positions = np.arange(tile.start, tile.length, dtype=np.int32)
        key_positions = np.arange(length, dtype=np.int32)
        num_prefix = tile.num_prefix if kind.spec.prefix_end else 0
        kind.shape_scores(scores, query_positions[:, None], key_positions, key_positions[-1:], num_prefix)
        softmax(scores)
        mixed = scores.reshape(kv_heads, group * count, length) @ v
        mixed = mixed.reshape(kv_heads, group, count, dim)
        layer.out[tile.rows].reshape(count, kv_heads, group, dim)[...] = mixed.transpose(2, 0, 1, 3)

    def _history(self, source: Float32Array, tile: _Sequence, spec: AttentionSpec) -> Float32Array:
        """Keys or values that a tile's queries may see: ``[K, length, C]``."""
        rows, total = tile.whole
        length = tile.length if spec.causal else total
        if spec.prefix_end:
            length = max(length, min(tile.num_prefix, total))
        if spec.cached:
            return _paged(source, tile.blocks[: -(-length // self._block_size)], length)
        return source[:, rows.start : rows.start + length]

    def _attend_decodes(self, layer: _Layer) -> None:
        """The gathered one-token sequences, in groups of similar length so that padding stays below a third."""
        order = sorted(range(self._num_gathered), key=lambda index: len(self._sequences[index].blocks))
        while order:
            shortest = len(self._sequences[order[0]].blocks)
            taken = sum(len(self._sequences[index].blocks) <= shortest + shortest // 2 + 1 for index in order)
            members, order = np.array(order[:taken]), order[taken:]
            self._attend_group(members, layer)

    def _attend_group(self, members: Int32Array, layer: _Layer) -> None:
        kind, sequences = layer.kind, [self._sequences[index] for index in members]
        group, kv_heads, dim = kind.group, kind.heads.num_kv_heads, kind.heads.head_dim
        longest = max(len(sequence.blocks) for sequence in sequences)
        blocks = np.zeros((len(sequences), longest), np.int32)
        for row, sequence in zip(blocks, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        gathered = (kv_heads, len(sequences), longest * self._block_size, dim)
        k, v = (pages.take(blocks, axis=1).reshape(gathered) for pages in (layer.keys, layer.values))
        lengths = np.array([[sequence.length] for sequence in sequences], np.int32)
        key_positions = np.arange(gathered[2], dtype=np.int32)
        # Rows past a sequence's end belong to others: their weight is zero, but zero times NaN is not.
        v[:, key_positions >= lengths] = 0
        q = layer.queries[members].reshape(len(members), kv_heads, group, dim).swapaxes(0, 1)
        scores = np.ascontiguousarray((q @ k.swapaxes(2, 3)).swapaxes(1, 2))
        kind.shape_scores(scores, lengths - 1, key_positions, lengths - 1)
        softmax(scores)
        mixed = scores.swapaxes(1, 2) @ v
        layer.out[members] = mixed.swapaxes(0, 1).reshape(len(members), kind.heads.num_heads, dim)


def _tiles(sequence: _Sequence) -> Iterator[_Sequence]:
    """Up to QUERY_TILE queries at a time, each with the history that it can see: about half the scores of a whole prompt."""
    rows = sequence.rows
    for first in range(rows.start, rows.stop, QUERY_TILE):
        last = min(first + QUERY_TILE, rows.stop)
        start, length = sequence.start + first - rows.start, sequence.start + last - rows.start
        yield _Sequence(slice(first, last), start, length, sequence.blocks, sequence.whole, sequence.num_prefix)


def _paged(pages: Float32Array, blocks: Int32Array, length: int) -> Float32Array:
    """Keys or values of one sequence: ``[K, length, C]``, a view where its blocks are consecutive."""
    first, count = int(blocks[0]), len(blocks)
    consecutive = count == 1 or (int(blocks[-1]) - first == count - 1 and bool((np.diff(blocks) == 1).all()))
    taken = pages[:, first : first + count] if consecutive else pages.take(blocks, axis=1)
    return taken.reshape(len(pages), -1, pages.shape[-1])[:, :length]
