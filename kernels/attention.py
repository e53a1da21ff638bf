# SPDX-License-Identifier: Apache-2.0
"""Paged attention on the GPU: one object per kind of attention, one split of the work a step, at most two launches a layer.

    attention = PagedAttention(library, shape, limits, alibi_slopes)
    attention.bind(workspace)                                  # once: workspace_bytes that stay put
    attention.split_work(step)                                 # once a step, before the first layer
    attention.decode(qkv, key_pages, value_pages, out, step)   # every layer
    attention.prefill(qkv, key_pages, value_pages, out, step)  # every layer, unless the step cannot hold prefill

Everything is enqueued on the current CuPy stream, allocates nothing, waits for nothing and reads lengths on the
device, so a whole step can be captured in a CUDA graph and replayed with other lengths. `decode` writes the output rows
of sequences with one new token, `prefill` those of sequences with several; either leaves all other rows alone and does
nothing in a step without its kind, and they may run side by side. Layers with different windows need one object (and
one split) per kind.

Shape legend: T tokens, S sequences, H local query heads, K local key/value heads, C head dim, N blocks, P tokens per
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.kernels.arrays import ceil_div, require
from phalanx.kernels.attention_shape import AttentionLimits, AttentionShape, AttentionStep
from phalanx.kernels.attention_tiling import DecodeTiling, PrefillTiling, WorkspaceLayout
from phalanx.kernels.compiler import KernelSpec
from phalanx.kernels.library import KernelFunction, Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["PagedAttention", "attention_kernel_specs"]

_SPLIT_THREADS = 1024
_DECODE_THREADS = 160
_FLOAT32_THREADS = 128
_COST_BUCKETS = 1024  # of the split's counting sort
_COST_SHIFT = 7  # tiles whose last rows see equally many times 128 keys cost the same


class PagedAttention:
    """Attention of one kind over paged keys and values.

    Construction compiles the kernels (seconds with a cold cache) and loads them; do it before a stream is captured.
    """

    def __init__(
        self, library: Library, shape: AttentionShape, limits: AttentionLimits, alibi_slopes: Any | None = None
    ) -> None:
        """``alibi_slopes``: float32 ``[H]`` on the device, the local heads' slopes; None = no ALiBi."""
        if alibi_slopes is not None:
            require("alibi_slopes", alibi_slopes, (shape.num_heads,), "float32")
        self._shape = shape
        self._limits = limits
        self._alibi_slopes = alibi_slopes
        self._decode_tiling = _decode_tiling(shape, library.architecture)
        self._prefill_tiling = PrefillTiling.choose(shape.head_dim, library.architecture)
        self._num_multiprocessors = library.num_multiprocessors
        self._max_workers = self._decode_tiling.blocks_per_multiprocessor * library.num_multiprocessors
        self._layout = WorkspaceLayout.of(
            self._max_workers, limits.max_num_seqs, self._max_prefill_tiles, self._decode_tiling.partial_floats
        )
        self._kernels = _load(library, shape, alibi_slopes is not None)
        self._workspace: _Workspace | None = None

    @property
    def workspace_bytes(self) -> int:
        """Device memory that `bind` needs: the work split and float32 partial results of split sequences."""
        return self._layout.num_bytes

    def bind(self, workspace: Any) -> None:
        """Use this uint8 device array, 256-byte aligned, from now on.

        Objects whose steps may overlap must not share one. Raises ExecutorError when it is too small.
        """
        if workspace.nbytes < self.workspace_bytes:
            raise ExecutorError(
                f"attention workspace of {workspace.nbytes} bytes is below {self.workspace_bytes}; "
                "allocate workspace_bytes"
            )
        self._workspace = _Workspace.of(workspace, self._layout)

    def split_work(self, step: AttentionStep) -> None:
        """Divide the step's work among the GPU's multiprocessors. Enqueues on the current stream; does not wait."""
        if "work_split" not in self._kernels:
            return
        self._check(step)
        workspace, shape = self._bound(), self._shape
        inputs = (step.cu_seqlens_q, step.seq_lens, step.seq_indices, step.block_tables, step.num_seqs_and_decodes)
        ends = (workspace.decode_ends, workspace.prefill_ends)
        sizes = (
            step.block_tables.shape[1],
            shape.block_size,
            shape.num_kv_heads * self._decode_tiling.head_tiles,
            self._max_workers,
            shape.window,
            shape.group,
            self._prefill_tiling.rows,
            max(_COST_SHIFT, self._limits.max_seq_len.bit_length() - (_COST_BUCKETS - 1).bit_length()),
        )
        arrays = (*inputs, workspace.work_split, *ends, workspace.prefill_tiles, workspace.flags)
        self._kernels["work_split"]((1,), (_SPLIT_THREADS,), (*arrays, *map(np.int32, sizes)))

    def decode(
        self, qkv: Any, key_pages: Any, value_pages: Any, out: Any, step: AttentionStep, kv_scales: Any | None = None
    ) -> None:
        """Attend for the sequences with one new token: row ``s`` of ``out`` for sequence ``s``.

        ``qkv``: ``[T, >= H C]``, queries first in each row (the fused qkv matrix as it is, or a strided part of it);
        pages: ``[N, K, P, C]``, this step's tokens already written; ``out``: ``[T, H C]``; ``kv_scales``: ``[2, K]``
        float32, of keys and of values, for pages of codes.
        Enqueues on the current stream; does not wait.
        """
        tensors = self._tensors(qkv, key_pages, value_pages, out)
        if "float32" in self._kernels:
            self._launch_float32(tensors, out.shape[0], step, is_decode=True)
            return
        workspace = self._bound()
        table = (step.seq_lens, step.seq_indices, step.block_tables, np.int32(step.block_tables.shape[1]))
        scratch = (workspace.work_split, workspace.partials, workspace.flags)
        self._kernels["decode"](
            (self._max_workers,),
            (_DECODE_THREADS,),
            (*tensors, *table, *scratch, *self._scales(kv_scales), *self._score_arguments),
            shared_mem=self._decode_tiling.shared_bytes,
        )

    def prefill(
        self, qkv: Any, key_pages: Any, value_pages: Any, out: Any, step: AttentionStep, kv_scales: Any | None = None
    ) -> None:
        """Attend for the sequences with several new tokens, with or without history; arguments as for `decode`."""
        tensors = self._tensors(qkv, key_pages, value_pages, out)
        if "float32" in self._kernels:
            self._launch_float32(tensors, out.shape[0], step, is_decode=False)
            return
        workspace = self._bound()
        table = (step.block_tables, np.int32(step.block_tables.shape[1]))
        grid = min(self._num_multiprocessors, self._max_prefill_tiles * self._shape.num_kv_heads)
        self._kernels["prefill"](
            (max(1, grid),),
            (self._prefill_tiling.threads,),
            (
                *tensors,
                *table,
                workspace.work_split,
                workspace.prefill_tiles,
                *self._scales(kv_scales),
                self._prefix_lens(step),
                *self._score_arguments,
            ),
            shared_mem=self._prefill_tiling.shared_bytes,
        )

    @property
    def _max_prefill_tiles(self) -> int:
        """Full tiles of all tokens, and one that is not full for each sequence (which has two tokens or more)."""
        limits = self._limits
        full = ceil_div(limits.max_num_tokens * self._shape.group, self._prefill_tiling.rows)
        return full + min(limits.max_num_seqs, limits.max_num_tokens // 2)

    @property
    def _score_arguments(self) -> tuple[Any, ...]:
        shape = self._shape
        return np.float32(shape.scale), np.float32(shape.soft_cap), np.int32(shape.window)

    def _scales(self, kv_scales: Any | None) -> tuple[Any, ...]:
        if self._shape.has_fp8_pages:
            if kv_scales is None:
                raise ExecutorError("pages of codes need their scales; pass kv_scales")
            require("kv_scales", kv_scales, (2, self._shape.num_kv_heads), "float32")
        return self._alibi_slopes, kv_scales

    def _prefix_lens(self, step: AttentionStep) -> Any | None:
        if not self._shape.has_prefix:
            return None
        if step.prefix_lens is None:
            raise ExecutorError("attention with a prefix needs its length for each row; pass prefix_lens")
        require("prefix_lens", step.prefix_lens, step.prefix_lens.shape, "int32")
        return step.prefix_lens

    def _launch_float32(self, tensors: tuple[Any, ...], num_rows: int, step: AttentionStep, *, is_decode: bool) -> None:
        table = (step.block_tables, np.int32(step.block_tables.shape[1]), step.num_seqs_and_decodes)
        lengths = (step.cu_seqlens_q, step.seq_lens, step.seq_indices)
        extra = (self._alibi_slopes, self._prefix_lens(step))
        arguments = (*tensors, *lengths, *table, *extra, *self._score_arguments, np.int32(is_decode))
        self._kernels["float32"]((num_rows, self._shape.num_heads), (_FLOAT32_THREADS,), arguments)

    def _tensors(self, qkv: Any, key_pages: Any, value_pages: Any, out: Any) -> tuple[Any, ...]:
        shape = self._shape
        row = shape.num_heads * shape.head_dim
        if qkv.ndim != 2 or qkv.shape[1] < row or qkv.strides[1] != qkv.itemsize or qkv.strides[0] % 16:
            raise ExecutorError(
                f"qkv is {qkv.dtype.name}{list(qkv.shape)} with strides {qkv.strides}; this call needs rows of {row} "
                "queries or more, 16-byte aligned"
            )
        pages = (key_pages.shape[0], shape.num_kv_heads, shape.block_size, shape.head_dim)
        require("out", out, (qkv.shape[0], row), shape.dtype)
        require("key_pages", key_pages, pages, shape.page_dtype)
        require("value_pages", value_pages, pages, shape.page_dtype)
        return qkv, np.int64(qkv.strides[0] // qkv.itemsize), key_pages, value_pages, out

    def _check(self, step: AttentionStep) -> None:
        num_seqs = step.seq_lens.shape[0]
        if num_seqs > self._limits.max_num_seqs:
            raise ExecutorError(
                f"a step of {num_seqs} sequences is above max_num_seqs={self._limits.max_num_seqs}; raise the limit"
            )
        require("cu_seqlens_q", step.cu_seqlens_q, (num_seqs + 1,), "int32")
        require("seq_indices", step.seq_indices, (num_seqs,), "int32")
        require("num_seqs_and_decodes", step.num_seqs_and_decodes, (2,), "int32")

    def _bound(self) -> _Workspace:
        if self._workspace is None:
            raise ExecutorError("attention has no workspace yet; call bind with workspace_bytes of device memory")
        return self._workspace


def attention_kernel_specs(shape: AttentionShape, architecture: str, has_alibi: bool) -> list[KernelSpec]:
    """What a `PagedAttention` of this shape compiles on this architecture, to do so ahead of time or without a GPU."""
    calls = _calls(shape, architecture, has_alibi)
    return [KernelSpec.of(call.source, call.defines) for call in calls.values()]


@dataclass(frozen=True, slots=True)
class _Workspace:
    """Views of the bound memory, one a part of `WorkspaceLayout`."""

    work_split: Any
    decode_ends: Any
    prefill_ends: Any
    prefill_tiles: Any
    flags: Any
    partials: Any

    @classmethod
    def of(cls, memory: Any, layout: WorkspaceLayout) -> _Workspace:
        return cls(*(memory[getattr(layout, name) :] for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class _Call:
    """A kernel, named as its file, with its compile-time constants."""

    source: str
    defines: dict[str, int]
    shared_bytes: int = 0


def _calls(shape: AttentionShape, architecture: str, has_alibi: bool) -> dict[str, _Call]:
    """The kernels of one shape by role: ``float32`` alone, or ``work_split``, ``decode`` and ``prefill``."""
    common = {
        "HEAD_DIM": shape.head_dim,
        "BLOCK_SIZE": shape.block_size,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "WINDOW": int(shape.window > 0),
        "SOFT_CAP": int(shape.soft_cap > 0),
        "ALIBI": int(has_alibi),
    }
    causal = {"CAUSAL": int(shape.causal), "PREFIX": int(shape.has_prefix)}
    if shape.dtype == "float32":
        return {"float32": _Call("attention_float32", common | causal)}
    common |= {"BFLOAT16": int(shape.dtype == "bfloat16"), "KV_FP8": int(shape.has_fp8_pages)}
    decode = _decode_tiling(shape, architecture)
    prefill = PrefillTiling.choose(shape.head_dim, architecture)
    return {
        "work_split": _Call("attention_work_split", {}),
        "decode": _Call("attention_decode", common | decode.defines, decode.shared_bytes),
        "prefill": _Call(prefill.source, common | causal | prefill.defines, prefill.shared_bytes),
    }


def _decode_tiling(shape: AttentionShape, architecture: str) -> DecodeTiling:
    return DecodeTiling.choose(shape.head_dim, shape.group, architecture, shape.has_fp8_pages)


def _load(library: Library, shape: AttentionShape, has_alibi: bool) -> dict[str, KernelFunction]:
    calls = _calls(shape, library.architecture, has_alibi)
    return {
        role: library.function(call.source, call.source, shared_bytes=call.shared_bytes, **call.defines)
        for role, call in calls.items()
    }
