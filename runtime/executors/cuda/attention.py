# SPDX-License-Identifier: Apache-2.0
"""The paged key/value cache of one rank and attention over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.kernels.attention import PagedAttention
from phalanx.kernels.attention_shape import AttentionDType, AttentionLimits, AttentionShape, AttentionStep
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.rotary import Fp8Pages, RotaryTables, rotary_kv_write
from phalanx.kernels.step_update import StepArrays, StepKernels
from phalanx.runtime.attention import AttentionSpec, LocalHeads
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.executors.cuda.activations import ActivationPool
from phalanx.runtime.executors.cuda.memory import DeviceArray, device_dtype
from phalanx.runtime.rope import rotary_table

__all__ = ["CacheLayout", "CudaAttention"]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One rank's share of the cache. Pages are ``[N, K local, P, C]``, keys and values apart, per layer.

    Attributes:
        heads: this rank's share of each layer's heads, by the layer's number in the whole model.
        dtype: of queries and, without ``has_fp8_pages``, of pages.
    """

    heads: Mapping[int, LocalHeads]
    block_size: int
    dtype: AttentionDType
    has_fp8_pages: bool = False

    @classmethod
    def of(
        cls, specs: Mapping[int, AttentionSpec], block_size: int, dtype: AttentionDType, rank: int, size: int,
        has_fp8_pages: bool = False,
    ) -> CacheLayout:  # fmt: skip
        """The share of ``rank`` of ``size`` tensor-parallel ranks; ``specs``: each layer's attention."""
        heads = {layer: LocalHeads.of(spec, rank, size) for layer, spec in specs.items()}
        return cls(heads, block_size, dtype, has_fp8_pages)

    @property
    def page_dtype(self) -> np.dtype[Any]:
        """What pages hold; codes are bytes."""
        return np.dtype(np.uint8) if self.has_fp8_pages else device_dtype(self.dtype)

    def shape(self, spec: AttentionSpec, layer: int) -> AttentionShape:
        """What kernels compute for a layer whose attention is ``spec``.

        Raises:
            ConfigError: none of them does.
        """
        heads = self.heads[layer]
        return AttentionShape(
            heads.num_heads, heads.num_kv_heads, heads.head_dim, self.block_size, self.dtype,
            scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, causal=spec.causal,
            has_prefix=bool(spec.prefix_end), has_fp8_pages=self.has_fp8_pages,
        )  # fmt: skip

    def allocate(self, num_blocks: int) -> dict[int, tuple[DeviceArray, DeviceArray]]:
        """Zeroed pages of every layer: ``{layer: (keys, values)}``. Zeros, because 0 * NaN would not be 0."""
        import cupy

        pages = {}
        for layer, heads in self.heads.items():
            shape = (num_blocks, heads.num_kv_heads, self.block_size, heads.head_dim)
            pages[layer] = cupy.zeros(shape, self.page_dtype), cupy.zeros(shape, self.page_dtype)
        return pages


class CudaAttention:
    """Rotary embedding, cache write and attention of one rank; see `phalanx.runtime.ops.Ops.attention`.

    Each kind of attention that a model names (window, soft cap, ...) gets its kernels when it is first used, which must
    be outside a capture; every kind divides each step's work once, before its first layer.

    Attributes:
        saturated: ``[1]`` int32, counts values beyond the largest code of fp8 pages modulo 2**32; None = other pages.
    """

    def __init__(
        self,
        library: KernelLibrary,
        layout: CacheLayout,
        limits: AttentionLimits,
        arrays: StepArrays,
        pool: ActivationPool,
        kv_scales: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        """``kv_scales``: for each layer ``[2, K local]`` scales of keys and values, if pages hold fp8 codes."""
        import cupy

        self._fp8: dict[int, Fp8Pages] = {}
        self.saturated: DeviceArray | None = None
        if kv_scales is not None:
            self.saturated = cupy.zeros(1, np.int32)
            self._fp8 = {layer: Fp8Pages(cupy.asarray(scales), self.saturated) for layer, scales in kv_scales.items()}
        self._library, self._layout, self._limits, self._arrays, self._pool = library, layout, limits, arrays, pool
        self._pages = layout.allocate(1)
        self._kinds: dict[AttentionSpec, PagedAttention] = {}
        self._rotary: dict[RopeConfig, RotaryTables] = {}
        self._split: set[AttentionSpec] = set()
        self._has_prefill = False
        self._step = AttentionStep(
            arrays.cu_seqlens, arrays.seq_lens, arrays.seq_indices, arrays.block_tables, arrays.num_seqs_and_decodes,
            arrays.prefix_lens,
        )  # fmt: skip

    def local_heads(self, layer: int) -> LocalHeads:
        """This rank's share of a layer's heads."""
        return self._layout.heads[layer]

    def allocate(self, num_blocks: int) -> None:
        """Replace the pages by ``num_blocks`` of them. Graphs captured before must not be replayed any more."""
        self._pages.clear()
        self._pages = self._layout.allocate(num_blocks)

    def release(self) -> None:
        """Free the pages."""
        self._pages.clear()

    def copy_blocks(self, step: StepKernels, num_copies: int) -> None:
        """Carry out the block copies of the plan on the device, in all layers. Enqueues; does not wait."""
        for keys, values in self._pages.values():
            step.copy_blocks(keys, num_copies)
            step.copy_blocks(values, num_copies)

    def begin(self, has_prefill: bool) -> None:
        """Start a step; without ``has_prefill`` all its sequences compute one token."""
        self._split.clear()
        self._has_prefill = has_prefill

    def __call__(self, qkv: DeviceArray, layer: int, spec: AttentionSpec) -> DeviceArray:
        """``[T, (H + 2K) C local] -> [T, H C local]``; rotates queries in place in ``qkv``."""
        kind = self._kinds.get(spec) or self._create(spec, layer)
        rows, heads, (keys, values) = len(qkv), self._layout.heads[layer], self._pages[layer]
        fp8 = self._fp8.get(layer)
        kv_scales = None if fp8 is None else fp8.kv_scales
        rotary_kv_write(
            self._library, qkv, self._arrays.positions[:rows], self._arrays.slot_mapping[:rows], keys, values,
            None if spec.rope is None else self._tables(spec.rope), num_heads=heads.num_heads, fp8=fp8,
            prefix_lens=self._arrays.prefix_lens[:rows],
        )  # fmt: skip
        if spec not in self._split:
            self._split.add(spec)
            kind.split_work(self._step)
        out = self._pool.array((rows, heads.num_heads * heads.head_dim), qkv.dtype)
        kind.decode(qkv, keys, values, out, self._step, kv_scales)
        if self._has_prefill:
            kind.prefill(qkv, keys, values, out, self._step, kv_scales)
        return out

    def _create(self, spec: AttentionSpec, layer: int) -> PagedAttention:
        import cupy

        heads = self._layout.heads[layer]
        slopes = None
        if spec.alibi_slopes is not None:
            slopes = cupy.asarray(np.array(spec.alibi_slopes[heads.heads.start : heads.heads.stop], np.float32))
        kind = PagedAttention(self._library, self._layout.shape(spec, layer), self._limits, slopes)
        kind.bind(cupy.zeros(max(kind.workspace_bytes, 1), np.uint8))
        self._kinds[spec] = kind
        return kind

    def _tables(self, rope: RopeConfig) -> RotaryTables:
        import cupy

        if rope not in self._rotary:
            tables: Any = rotary_table(rope, self._limits.max_seq_len)
            cos, sin = (cupy.asarray(table.astype(np.float32)) for table in tables)
            self._rotary[rope] = RotaryTables(cos, sin, rope.interleaved, rope.two_dimensional)
        return self._rotary[rope]
