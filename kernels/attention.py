"""Paged attention on the GPU: one object per kind of attention, one plan a step, at most two launches a layer.

    attention = PagedAttention(library, shape, limits, alibi_slopes)
    attention.bind(arena.take(attention.workspace_bytes))          # once; the address must stay put
    attention.plan(step)                                           # once a step, before the first layer
    attention.decode(qkv, key_pages, value_pages, out, step)       # every layer
    attention.prefill(qkv, key_pages, value_pages, out, step)      # every layer, unless the step cannot hold prefill

Everything is enqueued on the current CuPy stream, allocates nothing, waits for nothing and reads lengths on the device, so
a whole step can be captured in a CUDA graph and replayed with other lengths. `decode` writes the output rows of sequences
with one new token, `prefill` those of sequences with several; either leaves all other rows alone and does nothing in a step
without its kind. Layers with different windows need one object (and one plan) per kind.

Shape legend: T tokens, S sequences, H local query heads, K local key/value heads, C head dim, N blocks, P tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from phalanx.kernels.library import Library

__all__ = ["AttentionLimits", "AttentionShape", "AttentionStep", "PagedAttention"]

AttentionDType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one kernel specialisation computes, in this rank's local sizes.

    Attributes:
        num_heads, num_kv_heads: H and K, H a multiple of K.
        head_dim: C, a multiple of 8 up to 256.
        block_size: P, tokens per block: 16, 32, 64 or 128.
        dtype: of queries, pages and output. float32 runs a slow kernel that exists for checking.
        scale: factor on the scores.
        window: a query sees this many positions, itself included; 0 = all before it.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 = off.
        causal: a token sees its own sequence up to itself; False = the whole sequence (encoders).

    Raises:
        ConfigError: a value that no kernel here computes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: AttentionDType
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    causal: bool = True


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """Upper bounds that size the workspace and the grids; they bound every later step.

    Attributes:
        max_num_seqs: most sequences in one step.
        max_num_tokens: most tokens in one step.
        max_seq_len: longest sequence, history and new tokens together.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where a step's sequences are: int32 arrays on the device, read by the kernels when they run.

    Sequences with exactly one new token come first, those with several after them; entries past the counts are padding
    and may hold anything.

    Attributes:
        cu_seqlens_q: ``[S + 1]``, first row of each sequence in the packed activations.
        seq_lens: ``[S]``, tokens of each sequence including this step's, at least 1.
        slots: ``[S]``, row of each sequence in ``block_tables``.
        block_tables: ``[max_slots, max_blocks]``, blocks of each slot in order.
        counts: ``[2]``, number of sequences in this step and how many of them have one new token.
    """

    cu_seqlens_q: Any
    seq_lens: Any
    slots: Any
    block_tables: Any
    counts: Any


class PagedAttention:
    """Attention of one kind over paged keys and values.

    Construction compiles the kernels (seconds with a cold cache) and loads them; do it before a stream is captured.
    """

    def __init__(
        self, library: Library, shape: AttentionShape, limits: AttentionLimits, alibi_slopes: Any | None = None
    ) -> None:
        """``alibi_slopes``: float32 ``[H]`` on the device, the local heads' slopes; None = no ALiBi."""
        raise NotImplementedError

    @property
    def workspace_bytes(self) -> int:
        """Device memory that `bind` needs: the plan and float32 partial results of split sequences."""
        raise NotImplementedError

    def bind(self, workspace: Any) -> None:
        """Use this uint8 device array, 256-byte aligned, from now on. Objects whose steps may overlap must not share one."""
        raise NotImplementedError

    def plan(self, step: AttentionStep) -> None:
        """Divide the step's work among the GPU's multiprocessors. Enqueues on the current stream; does not wait."""
        raise NotImplementedError

    def decode(self, qkv: Any, key_pages: Any, value_pages: Any, out: Any, step: AttentionStep) -> None:
        """Attend for the sequences with one new token: row ``s`` of ``out`` for sequence ``s``.

        ``qkv``: ``[T, >= H C]``, queries first in each row, rows contiguous or strided (the fused qkv matrix as it is);
        pages: ``[N, K, P, C]``, this step's tokens already written; ``out``: ``[T, H C]``.
        Enqueues on the current stream; does not wait.
        """
        raise NotImplementedError

    def prefill(self, qkv: Any, key_pages: Any, value_pages: Any, out: Any, step: AttentionStep) -> None:
        """Attend for the sequences with several new tokens, with or without earlier history; arguments as for `decode`."""
        raise NotImplementedError
