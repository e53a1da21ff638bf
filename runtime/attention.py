# SPDX-License-Identifier: Apache-2.0
"""What one attention of one layer is: declared by the family, the only source that executors build from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Span, local_heads, local_kv_heads
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.token_fields import is_finite_number

__all__ = ["AttentionSpec", "HeadNorm", "LocalHeads"]


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Norm of each query and key head before rotation (Henry et al. 2020), over C.

    Weights ``<attention>.query_norm`` and ``<attention>.key_norm``: ``[C]``, shared by all heads; with ``own_weights`` ``[H, C]`` and
    ``[K, C]``, or flat, as checkpoints that keep one vector per head are read.

    Attributes:
        weight_offset: added to the weights, 1 for Gemma 3.
        kind: RMSNorm or LayerNorm.
        own_weights: each head has its own weights (Command R+, StableLM 2 12B).
        has_bias: ``.query_norm.bias`` and ``.key_norm.bias`` of the weights' shapes are added (Phi).
    """

    eps: float
    weight_offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"
    own_weights: bool = False
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ConfigError(f"kind={self.kind!r} of a norm of heads is neither 'rms' nor 'layer'")
        for name in ("eps", "weight_offset"):
            if not is_finite_number(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} of a norm of heads is not a finite Python number")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One kind of attention. Head counts are the model's, over all ranks.

    A new variant is a field with a default: executors that do not list it refuse models that set it, by name and before
    weights are read (`phalanx.runtime.executors.capabilities`).

    Attributes:
        scale: factor on the scores, above 0, usually ``head_dim ** -0.5``.
        rope: rotary embedding of queries and keys; None = positions come from elsewhere.
        window: a query sees this many positions, itself included; 0 = all before it.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 = off (Gemma 2).
        alibi_slopes: one for each query head; ``slope * distance`` is subtracted from its scores (Press et al. 2022).
        head_norm: norm of query and key heads; None = none.
        causal: a token sees its sequence up to itself; False = all of it, which must then be in one step (encoders).
        cached: keys and values stay for later steps; False = they are used once (encoders).
        keys: whose keys and values are read, the tokens' own or those of an encoder's output (cross attention).
        prefix_end: tokens that follow one another once in every prompt; those before the last of them, the prefix, see one
            another, also the later ones (prefix language model, Raffel et al. 2020), and must be in one step. Empty = no prefix.

    Raises:
        ConfigError: a field has a value or a type that it cannot have, or fields contradict each other.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None = None
    window: int = 0
    soft_cap: float = 0.0
    alibi_slopes: tuple[float, ...] | None = None
    head_norm: HeadNorm | None = None
    causal: bool = True
    cached: bool = True
    keys: Literal["own", "encoder"] = "own"
    prefix_end: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.alibi_slopes is not None:
            self._check_slopes(self.alibi_slopes)
        if self.rope is not None:
            self._check_rotation(self.rope)
        if self.window and not self.causal:
            raise ConfigError(f"window={self.window} needs causal attention; use window=0 where causal=False")
        if self.prefix_end and (self.window or not self.causal or not self.cached):
            raise ConfigError(
                f"prefix_end={self.prefix_end} needs causal attention without a window over cached keys; leave it out"
            )

    def _check_numbers(self) -> None:
        for name, least in {"num_heads": 1, "num_kv_heads": 1, "head_dim": 1, "window": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} of an attention is not a Python int of at least {least}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} of an attention is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if not is_finite_number(self.scale) or self.scale <= 0:
            raise ConfigError(f"scale={self.scale!r} of an attention is not a finite Python number above 0")
        if not is_finite_number(self.soft_cap) or self.soft_cap < 0:
            raise ConfigError(
                f"soft_cap={self.soft_cap!r} of an attention is not a finite Python number of at least 0; 0 = off"
            )

    def _check_slopes(self, slopes: tuple[float, ...]) -> None:
        if not isinstance(slopes, tuple) or not all(map(is_finite_number, slopes)):
            raise ConfigError(f"alibi_slopes={slopes!r} of an attention is not a tuple of finite Python numbers")
        if len(slopes) != self.num_heads:
            raise ConfigError(f"{len(slopes)} ALiBi slopes for num_heads={self.num_heads}; give one per head")

    def _check_rotation(self, rope: RopeConfig) -> None:
        parts = 2 if rope.two_dimensional else 1
        if rope.rotary_dim < 2 or rope.rotary_dim % 2 or parts * rope.rotary_dim > self.head_dim:
            raise ConfigError(
                f"rotary_dim={rope.rotary_dim} cannot turn pairs of {parts} part(s) of heads of head_dim={self.head_dim}; it must be even, "
                "and the parts no larger than a head: config.json is damaged"
            )

    @staticmethod
    def of(config: ModelConfig) -> AttentionSpec:
        """Causal attention with the model's own dimensions and the usual scale; a family replaces what differs."""
        return AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5, config.rope)


@dataclass(frozen=True, slots=True)
class LocalHeads:
    """One rank's share of an attention's heads.

    Attributes:
        heads, kv_heads: ranges of the model's query and key/value heads.
        head_dim: C.
    """

    heads: Span
    kv_heads: Span
    head_dim: int

    @staticmethod
    def of(spec: AttentionSpec, rank: int, size: int) -> LocalHeads:
        """The share of ``rank`` of ``size`` tensor-parallel ranks.

        Raises:
            ConfigError: the heads cannot be shared by ``size`` ranks.
        """
        return LocalHeads(
            local_heads(spec.num_heads, spec.num_kv_heads, rank, size),
            local_kv_heads(spec.num_kv_heads, rank, size),
            spec.head_dim,
        )

    @property
    def num_heads(self) -> int:
        """H local."""
        return self.heads.size

    @property
    def num_kv_heads(self) -> int:
        """K local."""
        return self.kv_heads.size
