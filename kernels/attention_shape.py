# SPDX-License-Identifier: Apache-2.0
"""What attention is computed: its kind, its bounds, and where the sequences of a step are. Letters as in `phalanx.kernels.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from phalanx.parallel.errors import ConfigError

__all__ = ["BLOCK_SIZES", "AttentionDType", "AttentionLimits", "AttentionShape", "AttentionStep"]

AttentionDType = Literal["bfloat16", "float16", "float32"]
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one kernel specialisation computes, in this rank's local sizes.

    Attributes:
        num_heads, num_kv_heads: H and K, H a multiple of K.
        head_dim: C, a multiple of 8 up to 256.
        block_size: P, tokens per block: 16, 32, 64 or 128.
        dtype: of queries and output, and of pages unless these hold e4m3. float32 runs a slow kernel that exists for
            checking.
        scale: factor on the scores.
        window: a query sees this many positions, itself included; 0 = all before it.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 = off.
        causal: a token sees its own sequence up to itself; False = the whole sequence (encoders).
        has_prefix: the first tokens of a sequence (``AttentionStep.prefix_lens``) are seen by all its tokens; they must be in one step.
        has_fp8_pages: keys and values are e4m3 bytes with one scale a head; needs head_dim in multiples of 16 and a
            16-bit dtype.

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
    has_prefix: bool = False
    has_fp8_pages: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads} on this rank; "
                "use a tensor-parallel size that keeps groups whole"
            )
        if self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ConfigError(
                f"head_dim={self.head_dim} is not a multiple of 8 up to 256; use --engine numpy for this model"
            )
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"--block-size={self.block_size} is not one of {BLOCK_SIZES}; 16 is the default")
        if self.scale <= 0 or self.window < 0 or self.soft_cap < 0:
            raise ConfigError(
                f"attention scale={self.scale}, window={self.window}, soft_cap={self.soft_cap}: the scale must be "
                "above 0 and the others not below; the model's config.json is damaged"
            )

        if self.has_fp8_pages and (self.head_dim % 16 or self.dtype == "float32"):
            raise ConfigError(
                f"an fp8 cache (--kv-cache-dtype, or the checkpoint's scales) needs head_dim in multiples of 16 and 16-bit activations; "
                f"this model has head_dim={self.head_dim} and computes in {self.dtype}; use --kv-cache-dtype {self.dtype}"
            )

    @property
    def page_dtype(self) -> str:
        """NumPy's name for what pages hold; codes are bytes."""
        return "uint8" if self.has_fp8_pages else self.dtype

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """Upper bounds that size the workspace and the grids; they bound every later step.

    Attributes:
        max_num_seqs: maximum number of sequences in one step.
        max_num_tokens: maximum number of tokens in one step.
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
        seq_indices: ``[S]``, row of each sequence in ``block_tables``.
        block_tables: ``[max_num_seqs, max_blocks]``, blocks of each sequence in order.
        num_seqs_and_decodes: ``[2]``, number of sequences in this step and how many of them have one new token.
        prefix_lens: ``[T]``, tokens of the prefix of each row's sequence; read with ``AttentionShape.has_prefix`` alone.
    """

    cu_seqlens_q: Any
    seq_lens: Any
    seq_indices: Any
    block_tables: Any
    num_seqs_and_decodes: Any
    prefix_lens: Any | None = None
