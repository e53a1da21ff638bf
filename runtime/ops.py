"""The seam between models and executors: about a dozen coarse operations, each one that the field has a kernel for.

A model is a plain function over an `Ops[Tensor]` object and cannot look inside a `Tensor`. The current step (token ids,
positions, slots, block tables) and the weights are bound to the object, so a model cannot tell prefill from decode, paged
from linear cache, eager from captured, or which rank it runs on.

Shape legend, used everywhere in Phalanx (sizes are per rank where the text says local):

    T tokens in the step     S sequences         D hidden          H query heads     K key/value heads
    C head dim               F feed-forward      V vocabulary      E experts         N blocks
    P tokens per block       R ranks             L layers          B rows that need logits

Activations are packed ``[T, D]``: all tokens of the step over all sequences, no batch axis, no padding.

*Required* operations have no body. *Composed* ones are written here in terms of others; an executor overrides them only to
be faster. Each executor's set of required operations is checked by the tests in ``tests/ops``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from phalanx.runtime.config import Activation, ModelConfig, RopeConfig

__all__ = ["AttentionSpec", "Ops", "Tensor"]

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One kind of attention. Head counts are the model's, over all ranks; a new variant is a field with a default.

    Attributes:
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        rope: rotary embedding of queries and keys; None = positions come from elsewhere.
        window: a query sees this many positions, itself included; 0 = all before it.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 = off (Gemma 2).
        alibi: subtract ``slope[head] * distance`` from scores (Press et al. 2022).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None = None
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False

    @staticmethod
    def of(config: ModelConfig) -> AttentionSpec:
        """Causal attention with the model's own dimensions and the usual scale."""
        return AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5, config.rope)


class Ops(ABC, Generic[Tensor]):
    """Operations of one rank over one step. Weight names stand for handles: ``linear(x, "layers.3.qkv")``."""

    # Required

    @abstractmethod
    def embedding(self, name: str, scale: float = 1.0) -> Tensor:
        """Rows of a vocabulary-parallel table for the step's token ids, times ``scale``, summed over ranks: ``[T, D]``."""

    @abstractmethod
    def position_embedding(self, x: Tensor, name: str) -> Tensor:
        """Add a learned position row to each token: ``[T, D]``."""

    @abstractmethod
    def rms_norm(self, x: Tensor, name: str, eps: float, weight_offset: float = 0.0) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over D (Zhang & Sennrich 2019)."""

    @abstractmethod
    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        """``(x - mean) / sqrt(var + eps) * weight + bias`` over D (Ba et al. 2016)."""

    @abstractmethod
    def column_linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T + bias`` with a weight split by outputs (bias, if any, too): ``[T, in] -> [T, out local]``."""

    @abstractmethod
    def row_linear_partial(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T`` with a weight split by inputs, no bias, not summed yet: ``[T, in local] -> [T, out]``."""

    @abstractmethod
    def add_bias(self, x: Tensor, name: str) -> Tensor:
        """Add the bias of a row-parallel weight where it has one, else return ``x``."""

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks. *Collective.*"""

    @abstractmethod
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Element by element sum."""

    @abstractmethod
    def activation(self, x: Tensor, kind: Activation) -> Tensor:
        """Element by element: ``[T, F local]``."""

    @abstractmethod
    def gated_activation(self, x: Tensor, kind: Activation) -> Tensor:
        """``kind(gate) * up`` where ``x`` holds gate, then up: ``[T, 2F local] -> [T, F local]`` (Shazeer 2020)."""

    @abstractmethod
    def attention(self, qkv: Tensor, name: str, layer: int, spec: AttentionSpec) -> Tensor:
        """Rotate, store keys and values in the cache, attend: ``[T, (H + 2K) C local] -> [T, H C local]``.

        ``qkv`` holds the queries of all local heads, then keys, then values, as one matrix product leaves them: every
        executor fuses differently from here (rotary into the cache write, GQA heads into one tile), so this is one
        operation. ``name`` is where weights of the attention itself are found, ``layer`` the number of its cache; each
        query sees its own sequence up to itself.
        """

    @abstractmethod
    def logits(self, x: Tensor, name: str) -> Tensor:
        """Vocabulary-parallel head over the rows that need logits: ``[T, D] -> [B, V local]``."""

    # Composed

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T + bias`` with a weight that every rank holds in full: ``[T, in] -> [T, out]``."""
        return self.column_linear(x, name)

    def row_linear(self, x: Tensor, name: str) -> Tensor:
        """The second matrix of a Megatron pair, split by inputs: partial product, sum over ranks, bias once."""
        return self.add_bias(self.all_reduce(self.row_linear_partial(x, name)), name)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``residual += x``, then RMSNorm of it: ``(normed, residual)``. No residual yet: ``x`` becomes it."""
        total = x if residual is None else self.add(x, residual)
        return self.rms_norm(total, name, eps, weight_offset), total

    def add_layer_norm(self, x: Tensor, residual: Tensor | None, name: str, eps: float) -> tuple[Tensor, Tensor]:
        """``residual += x``, then LayerNorm of it: ``(normed, residual)``. No residual yet: ``x`` becomes it."""
        total = x if residual is None else self.add(x, residual)
        return self.layer_norm(total, name, eps), total
