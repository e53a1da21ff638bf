# SPDX-License-Identifier: Apache-2.0
"""The seam between models and executors: about a dozen coarse operations, each one that the field has a kernel for.

A model is a plain function over an `Ops[Tensor]` object and cannot look inside a `Tensor`. The current step (token ids,
positions, block tables) and the weights are bound to the object, so a model cannot tell prefill from decode, paged from
linear cache, eager from captured, or which rank it runs on.

Shape legend, used everywhere in Phalanx (sizes are per rank where the text says local):

    T tokens in the step     S sequences         D hidden          H query heads     K key/value heads
    C head dim               F feed-forward      V vocabulary      E experts         N blocks
    P tokens per block       R ranks             L layers          B rows that need logits
    O, I output and input features of a matrix   G groups of a row that share a scale        Q rows that sample

(Whole networks of TensorRT have a batch axis and with it other letters: `phalanx.runtime.executors.tensorrt.ops`.)

Activations are packed ``[T, D]``: all tokens of the step over all sequences, no batch axis, no padding.

*Rows.* After the attention of a pass's last layer tokens no longer interact, so an executor may return only the rows that
need logits from there on. An operation with two tensors takes the rows of the shorter one: ``add``, ``sigmoid_gate`` and the norms that
add a residual.

*Ownership.* Products (`column_linear`, `row_linear`, `linear`, `experts`, `logits`) and the norms without a residual only
read their tensors, so parallel branches may share one. Every other operation owns its tensor arguments and may overwrite
them: use its result, never the argument again. `add_rms_norm` and `add_layer_norm` update ``residual`` in place or return
another; go on with what they return.

*Required* operations have no body. *Optional* ones raise; a model that uses one is refused by executors that lack it, before
weights are read (`phalanx.runtime.executors.capabilities`). *Composed* ones are written here in terms of others; an executor
overrides them only to be faster. ``tests/ops`` runs every operation on every executor against float64 NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar, get_args

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.attention import AttentionSpec
from phalanx.runtime.config import Activation

__all__ = ["AttentionSpec", "ExpertsSpec", "Ops", "Tensor"]

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of gated feed-forward parts (Shazeer et al. 2017; Jiang et al. 2024).

    Attributes:
        num_experts, top_k: E, and how many of them each token takes.
        activation: of the gate.
        renormalise: the chosen experts' probabilities are divided by their sum.

    Raises:
        ConfigError: a token would take no expert, or more than there are; the activation is unknown.
    """

    num_experts: int
    top_k: int
    activation: Activation
    renormalise: bool = True

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} of a mixture of experts is not a Python int of at least 1")
        if self.activation not in get_args(Activation):
            raise ConfigError(f"activation={self.activation!r} of experts is none of {', '.join(get_args(Activation))}")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.top_k} exceeds the {self.num_experts} experts of a layer; config.json is damaged"
            )


class Ops(ABC, Generic[Tensor]):
    """Operations of one rank over one step. Weight names stand for handles: ``column_linear(x, "layers.3.qkv")``."""

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
    def layer_norm(self, x: Tensor, name: str, eps: float, weight_offset: float = 0.0) -> Tensor:
        """``(x - mean) / sqrt(var + eps) * (weight + weight_offset) + bias`` over D (Ba et al. 2016).

        Weight and bias as far as they are declared: without a weight, factors are 1.
        """

    @abstractmethod
    def column_linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T + bias`` with a weight split by outputs (bias, if any, too): ``[T, in] -> [T, out local]``."""

    @abstractmethod
    def row_linear_partial(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T`` with a weight split by inputs, no bias, not summed yet: ``[T, in local] -> [T, out]``."""

    @abstractmethod
    def add_bias(self, x: Tensor, name: str) -> Tensor:
        """Add the bias of a row-parallel weight if it has one."""

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks. *Collective.*"""

    @abstractmethod
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Element by element sum."""

    @abstractmethod
    def scale(self, x: Tensor, factor: float) -> Tensor:
        """``x * factor``."""

    @abstractmethod
    def clip(self, x: Tensor, limit: float) -> Tensor:
        """``x`` within ``-limit`` to ``limit``."""

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
        operation. ``name`` is where weights of the attention itself are found (norms of heads), ``layer`` the number of
        its cache, ``spec`` what the family declares for that layer.
        """

    @abstractmethod
    def logits(self, x: Tensor, name: str, soft_cap: float = 0.0) -> Tensor:
        """Vocabulary-parallel head over the rows that need logits: ``[T, D] -> [B, V local]``.

        With ``soft_cap``, logits become ``soft_cap * tanh(logit / soft_cap)`` (Gemma 2).
        """

    # Optional

    def experts(self, x: Tensor, name: str, spec: ExpertsSpec) -> Tensor:
        """Each token's ``top_k`` experts, weighted and summed; not summed over ranks yet: ``[T, D] -> [T, D]``.

        Weights: ``<name>.router`` ``[E, D]``, whose products' softmax are the experts' probabilities;
        ``<name>.gate_up`` ``[E 2F local, D]``, gate then up of each expert in turn; ``<name>.down`` ``[E D, F local]``.
        Where ranks own experts whole, these two hold the rank's own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no experts; its capabilities must not list them")

    def sigmoid_gate(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """``x * sigmoid(y @ weight.T)`` row by row with a weight ``[1, D]`` that every rank holds; ``y`` is only read.

        ``x`` may be a product that is not summed over ranks yet: a factor for a row can come before or after the sum.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sigmoid_gate; its capabilities must not list it")

    # Composed

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T + bias`` with a weight that every rank holds in full: ``[T, in] -> [T, out]``."""
        return self.column_linear(x, name)

    def row_linear(self, x: Tensor, name: str) -> Tensor:
        """The second matrix of a Megatron pair, split by inputs: partial product, sum over ranks, bias once."""
        return self.add_bias(self.all_reduce(self.row_linear_partial(x, name)), name)

    def row_linear_pair(self, x: Tensor, name: str, y: Tensor, other: str) -> Tensor:
        """``row_linear`` of two branches, added: one sum over ranks for both (parallel residual, Wang & Komatsuzaki 2021)."""
        total = self.all_reduce(self.add(self.row_linear_partial(x, name), self.row_linear_partial(y, other)))
        return self.add_bias(self.add_bias(total, name), other)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``residual += x``, then RMSNorm of it: ``(normed, residual)``. No residual yet: ``x`` becomes it."""
        total = x if residual is None else self.add(x, residual)
        return self.rms_norm(total, name, eps, weight_offset), total

    def add_layer_norm(
        self, x: Tensor, residual: Tensor | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``residual += x``, then LayerNorm of it: ``(normed, residual)``. No residual yet: ``x`` becomes it."""
        total = x if residual is None else self.add(x, residual)
        return self.layer_norm(total, name, eps, weight_offset), total
