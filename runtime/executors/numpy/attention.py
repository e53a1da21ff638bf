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
from phalanx.parallel.sharding import local_heads, local_kv_heads
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.numpy.threads import Threads
from phalanx.runtime.ops import AttentionSpec
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
    """One sequence's share of a step."""

    rows: slice
    start: int
    length: int
    blocks: Int32Array


class NumpyAttention:
    """Key/value cache of one rank's layers, and attention over it.

    Args:
        layers: global numbers of the blocks that this rank holds.
        num_blocks, block_size: N and P.
        rank, size: place in the tensor-parallel group.
        max_len: longest sequence, for the rotary table.
        threads: what prompt chunks are shared by.
        kv_scales: for each layer ``[2, K]`` float32 scales of keys and values, which are then rounded to fp8 codes.
    """

    def __init__(
        self, config: ModelConfig, layers: range, num_blocks: int, block_size: int, rank: int, size: int, max_len: int,
        threads: Threads, kv_scales: Mapping[int, Float32Array] | None = None,
    ) -> None:  # fmt: skip
        self._kv_scales, self.num_saturated = kv_scales, 0
        heads = local_heads(config.num_heads, config.num_kv_heads, rank, size)
        kv_heads = local_kv_heads(config.num_kv_heads, rank, size)
        self._heads, self._kv_heads, self._head_dim = heads.size, kv_heads.size, config.head_dim
        self._first_head, self._block_size, self._threads = heads.start, block_size, threads
        shape = (self._kv_heads, num_blocks, block_size, self._head_dim)
        self._keys = {layer: np.zeros(shape, np.float32) for layer in layers}
        self._values = {layer: np.zeros(shape, np.float32) for layer in layers}
        self._rotary: tuple[Float32Array, Float32Array] | None = None
        if config.rope is not None:
            cos, sin = rotary_table(config.rope, max_len)
            self._rotary = cos.astype(np.float32), sin.astype(np.float32)
        self._positions = np.empty(0, np.int32)
        self._write = (self._positions, self._positions)
        self._sequences: list[_Sequence] = []
        self._tiles: list[_Sequence] = []
        self._num_gathered, self._shares_tiles = 0, False

    def bind(self, plan: StepPlan, state: BatchState) -> None:
        """Prepare for a step whose diffs ``state`` already holds."""
        self._positions, tables = plan.positions, state.block_tables[0]
        row_seq_indices = np.repeat(plan.seq_indices, plan.num_scheduled_tokens)
        self._write = (
            tables[row_seq_indices, self._positions // self._block_size],
            self._positions % self._block_size,
        )
        ends = plan.cu_seqlens
        self._sequences = []
        columns = (plan.seq_indices.tolist(), plan.starts.tolist(), plan.num_scheduled_tokens.tolist())
        for index, (seq_index, start, count) in enumerate(zip(*columns, strict=True)):
            length = start + count
            blocks = tables[seq_index, : -(-length // self._block_size)]
            self._sequences.append(_Sequence(slice(int(ends[index]), int(ends[index + 1])), start, length, blocks))
        self._num_gathered = plan.num_decodes if plan.num_decodes >= MIN_GATHERED_DECODES else 0
        alone = self._sequences[self._num_gathered :]
        self._tiles = [tile for sequence in alone for tile in _tiles(sequence, self._block_size)]
        self._shares_tiles = plan.num_tokens > plan.num_seqs  # one query alone is too little for a thread

    def copy_blocks(self, copies: Int32Array) -> None:
        """Copy whole blocks in all layers; ``copies`` as in `StepPlan.copies`."""
        if len(copies):
            _, source, destination = copies.T
            for cache in (*self._keys.values(), *self._values.values()):
                cache[:, destination] = cache[:, source]

    def __call__(self, qkv: Float32Array, layer: int, spec: AttentionSpec) -> Float32Array:
        """``[T, (H + 2K) C local] -> [T, H C local]``; see `phalanx.runtime.ops.Ops.attention`."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._head_dim
        packed = qkv.reshape(len(qkv), heads + 2 * kv_heads, dim)
        if spec.rope is not None:
            self._rotate(packed[:, : heads + kv_heads], spec.rope.rotary_dim)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, *self._write] = self._cached(packed[:, heads : heads + kv_heads], layer, 0).swapaxes(0, 1)
        values[:, *self._write] = self._cached(packed[:, heads + kv_heads :], layer, 1).swapaxes(0, 1)
        queries = packed[:, :heads] * np.float32(spec.scale)
        out = np.empty((len(qkv), heads, dim), np.float32)
        self._attend_decodes(queries, keys, values, spec, out)
        if self._shares_tiles:
            self._threads.run([partial(self._attend, tile, queries, keys, values, spec, out) for tile in self._tiles])
        else:
            for tile in self._tiles:
                self._attend(tile, queries, keys, values, spec, out)
        return out.reshape(len(qkv), heads * dim)

    def _cached(self, x: Float32Array, layer: int, kind: int) -> Float32Array:
        """What the cache holds of ``x`` ``[T, K, C]``: itself, or the values of its codes. ``kind``: 0 keys, 1 values."""
        if self._kv_scales is None:
            return x
        scale = self._kv_scales[layer][kind][:, None]
        inverse = np.float32(1) / scale
        self.num_saturated += int((np.abs(x * inverse) > E4M3_MAX).sum())
        stored: Float32Array = to_codes(x, inverse, "fp8").astype(np.float32) * scale
        return stored

    def _rotate(self, x: Float32Array, rotary_dim: int) -> None:
        """Rotate the halves of each head's leading ``rotary_dim`` in place: ``[T, heads, C]``."""
        assert self._rotary is not None
        cos, sin = (table[self._positions, None, :] for table in self._rotary)
        half = rotary_dim // 2
        first, second = x[..., :half], x[..., half:rotary_dim]
        rotated = first * cos - second * sin
        second *= cos
        second += first * sin
        first[...] = rotated

    def _attend(
        self, sequence: _Sequence, queries: Float32Array, keys: Float32Array, values: Float32Array,
        spec: AttentionSpec, out: Float32Array,
    ) -> None:  # fmt: skip
        """One sequence: scores ``[K, G Tq, L]`` where the G query heads of a key/value head are rows of one product."""
        group = self._heads // self._kv_heads
        count = sequence.rows.stop - sequence.rows.start
        q = queries[sequence.rows].reshape(count, self._kv_heads, group, self._head_dim).transpose(1, 2, 0, 3)
        k, v = (_history(cache, sequence.blocks, sequence.length) for cache in (keys, values))
        scores = q.reshape(self._kv_heads, group * count, self._head_dim) @ k.swapaxes(1, 2)
        scores = scores.reshape(self._kv_heads, group, count, sequence.length)
        query_positions = np.arange(sequence.start, sequence.length, dtype=np.int32)
        self._shape_scores(scores, query_positions[:, None], np.arange(sequence.length, dtype=np.int32), spec)
        _softmax(scores)
        mixed = scores.reshape(self._kv_heads, group * count, sequence.length) @ v
        mixed = mixed.reshape(self._kv_heads, group, count, self._head_dim)
        out[sequence.rows].reshape(count, self._kv_heads, group, self._head_dim)[...] = mixed.transpose(2, 0, 1, 3)

    def _attend_decodes(
        self, queries: Float32Array, keys: Float32Array, values: Float32Array, spec: AttentionSpec, out: Float32Array
    ) -> None:
        """The gathered one-token sequences, in groups of similar length so that padding stays below a third."""
        order = sorted(range(self._num_gathered), key=lambda index: len(self._sequences[index].blocks))
        while order:
            shortest = len(self._sequences[order[0]].blocks)
            taken = sum(len(self._sequences[index].blocks) <= shortest + shortest // 2 + 1 for index in order)
            members, order = np.array(order[:taken]), order[taken:]
            self._attend_group(members, queries, keys, values, spec, out)

    def _attend_group(
        self, members: Int32Array, queries: Float32Array, keys: Float32Array, values: Float32Array,
        spec: AttentionSpec, out: Float32Array,
    ) -> None:  # fmt: skip
        group, sequences = self._heads // self._kv_heads, [self._sequences[index] for index in members]
        longest = max(len(sequence.blocks) for sequence in sequences)
        blocks = np.zeros((len(sequences), longest), np.int32)
        for row, sequence in zip(blocks, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        gathered = (self._kv_heads, len(sequences), longest * self._block_size, self._head_dim)
        k, v = (cache.take(blocks, axis=1).reshape(gathered) for cache in (keys, values))
        lengths = np.array([[sequence.length] for sequence in sequences], np.int32)
        key_positions = np.arange(gathered[2], dtype=np.int32)
        # Rows past a sequence's end belong to others: their weight is zero, but zero times NaN is not.
        v[:, key_positions >= lengths] = 0
        q = queries[members].reshape(len(members), self._kv_heads, group, self._head_dim).swapaxes(0, 1)
        scores = np.ascontiguousarray((q @ k.swapaxes(2, 3)).swapaxes(1, 2))
        self._shape_scores(scores, lengths - 1, key_positions, spec)
        _softmax(scores)
        mixed = scores.swapaxes(1, 2) @ v
        out[members] = mixed.swapaxes(0, 1).reshape(len(members), self._heads, self._head_dim)

    def _shape_scores(
        self, scores: Float32Array, query_positions: Int32Array, key_positions: Int32Array, spec: AttentionSpec
    ) -> None:
        """Soft cap, ALiBi, mask, in place: scores ``[K, G, rows, L]``, query positions ``[rows, 1]``."""
        if spec.soft_cap:
            np.tanh(scores / np.float32(spec.soft_cap), out=scores)
            scores *= np.float32(spec.soft_cap)
        distance = query_positions - key_positions
        if spec.alibi:
            slopes = alibi_slopes(spec.num_heads)[self._first_head : self._first_head + self._heads]
            scores -= slopes.reshape(self._kv_heads, -1, 1, 1) * distance.astype(np.float32)
        hidden = distance < 0
        if spec.window:
            hidden |= distance >= spec.window
        if hidden.any():
            np.copyto(scores, -np.inf, where=hidden)


def alibi_slopes(num_heads: int) -> Float32Array:
    """``[H]`` ALiBi slopes (Press et al. 2022): a geometric series; heads beyond a power of two take every other term
    of the series for twice as many heads."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    extra = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power) + 1, 2))
    return np.concatenate((slopes, extra)).astype(np.float32)


def _tiles(sequence: _Sequence, block_size: int) -> Iterator[_Sequence]:
    """Up to QUERY_TILE queries at a time, each with the history that it can see: about half the scores of a whole prompt."""
    rows = sequence.rows
    for first in range(rows.start, rows.stop, QUERY_TILE):
        last = min(first + QUERY_TILE, rows.stop)
        start, length = sequence.start + first - rows.start, sequence.start + last - rows.start
        yield _Sequence(slice(first, last), start, length, sequence.blocks[: -(-length // block_size)])


def _history(cache: Float32Array, blocks: Int32Array, length: int) -> Float32Array:
    """Keys or values of one sequence: ``[K, L, C]``, a view where its blocks are consecutive."""
    first, count = int(blocks[0]), len(blocks)
    consecutive = count == 1 or (int(blocks[-1]) - first == count - 1 and bool((np.diff(blocks) == 1).all()))
    pages = cache[:, first : first + count] if consecutive else cache.take(blocks, axis=1)
    return pages.reshape(len(cache), -1, cache.shape[-1])[:, :length]


def _softmax(scores: Float32Array) -> None:
    """Softmax over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
