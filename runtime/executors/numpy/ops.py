# SPDX-License-Identifier: Apache-2.0
"""`Ops` on NumPy arrays: the reference implementation, and the engine of machines without a GPU. float32 throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.sharding import Span, local_experts
from phalanx.runtime.config import Activation
from phalanx.runtime.executors.capabilities import ALL_ENGINES, ANY, Capabilities
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.product import product
from phalanx.runtime.executors.numpy.scores import normalise_heads, softmax
from phalanx.runtime.executors.numpy.threads import Threads
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec, Ops

__all__ = ["CAPABILITIES", "NumpyOps", "NumpyStep"]

Float32Array = NDArray[np.float32]

PIECE = 1 << 16
"""Elements that an element-by-element operation works on at a time: 256 KiB."""


CAPABILITIES = Capabilities(
    engine="numpy",
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    features={
        **ALL_ENGINES,
        "attention.causal": ANY,
        "attention.prefix_end": ANY,
        "attention.rope.two_dimensional": ANY,
        "attention.cached": ANY,
        "attention.soft_cap": ANY,
        "attention.rope.long_factors": ANY,
        "attention.alibi_slopes": ANY,
        "attention.head_norm": ANY,
        "attention.head_norm.eps": ANY,
        "attention.head_norm.weight_offset": ANY,
        "attention.head_norm.kind": ANY,
        "attention.head_norm.own_weights": ANY,
        "attention.head_norm.has_bias": ANY,
        "logits.soft_cap": ANY,
        "experts": ANY,
        "experts.num_experts": ANY,
        "experts.top_k": ANY,
        "experts.activation": ANY,
        "experts.renormalise": ANY,
        "sigmoid_gate": ANY,
    },
    formats=None,
)
"""Weights are rounded to the type asked for; arithmetic is float32."""


@dataclass(frozen=True, slots=True)
class NumpyStep:
    """What the operations need of the current step."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]


class NumpyOps(Ops[Float32Array]):
    """One rank's operations; `bind` sets the step.

    Args:
        weights: this rank's shard, as operands of their formats' products.
        vocabulary: rows of the vocabulary that this rank holds.
        comm: the tensor-parallel group.
        attention: key/value cache and attention over it.
        threads: pool that shares large products.
    """

    def __init__(
        self,
        weights: Weights[Float32Array],
        vocabulary: Span,
        comm: Communicator,
        attention: NumpyAttention,
        threads: Threads,
    ) -> None:
        self._weights = weights
        self._vocabulary = vocabulary
        self._comm = comm
        self._attention = attention
        self._threads = threads
        self.stop_before_logits = False  # the head then gives the hidden states that `logits` would take
        self._step: NumpyStep | None = None

    def bind(self, step: NumpyStep) -> None:
        """Use ``step`` for everything that follows."""
        self._step = step

    @property
    def step(self) -> NumpyStep:
        """The bound step."""
        assert self._step is not None, "no step is bound"
        return self._step

    def embedding(self, name: str, scale: float = 1.0) -> Float32Array:
        table = self._weights.embedding(name)
        if self._comm.size == 1:
            rows: Float32Array = table[self.step.token_ids]
        else:
            local = self.step.token_ids - self._vocabulary.start
            mine = (local >= 0) & (local < self._vocabulary.stop - self._vocabulary.start)
            rows = np.where(mine[:, None], table[np.where(mine, local, 0)], np.float32(0))
            rows = self._comm.all_reduce(rows)
        return rows if scale == 1.0 else rows * np.float32(scale)

    def position_embedding(self, x: Float32Array, name: str) -> Float32Array:
        positioned: Float32Array = x + self._weights.embedding(name)[self.step.positions]
        return positioned

    def rms_norm(self, x: Float32Array, name: str, eps: float, weight_offset: float = 0.0) -> Float32Array:
        weight = self._weights.array(name)
        mean_square = np.einsum("td,td->t", x, x) / np.float32(x.shape[1])
        inverse = np.float32(1) / np.sqrt(mean_square + np.float32(eps))
        normed: Float32Array = x * inverse[:, None]
        normed *= weight + np.float32(weight_offset) if weight_offset else weight
        return normed

    def layer_norm(self, x: Float32Array, name: str, eps: float, weight_offset: float = 0.0) -> Float32Array:
        centred: Float32Array = x - x.mean(axis=1, keepdims=True)
        variance = np.einsum("td,td->t", centred, centred) / np.float32(x.shape[1])
        centred *= (np.float32(1) / np.sqrt(variance + np.float32(eps)))[:, None]
        weight, bias = self._weights.norm(name)
        if weight is not None:
            centred *= weight + np.float32(weight_offset) if weight_offset else weight
        if bias is not None:
            centred += bias
        return centred

    def column_linear(self, x: Float32Array, name: str) -> Float32Array:
        y = self.row_linear_partial(x, name)
        bias = self._weights.linear(name).bias
        if bias is not None:
            y += bias
        return y

    def row_linear_partial(self, x: Float32Array, name: str) -> Float32Array:
        weight = self._weights.linear(name)
        return weight.format.product(x, weight.components, self._multiply)

    def _multiply(self, x: Float32Array, weight: Float32Array) -> Float32Array:
        return product(x, weight, self._threads)

    def add_bias(self, x: Float32Array, name: str) -> Float32Array:
        bias = self._weights.linear(name).bias
        if bias is not None:
            x += bias
        return x

    def all_reduce(self, x: Float32Array) -> Float32Array:
        return self._comm.all_reduce(x)

    def add(self, x: Float32Array, y: Float32Array) -> Float32Array:
        return x + y

    def scale(self, x: Float32Array, factor: float) -> Float32Array:
        return x * np.float32(factor)

    def clip(self, x: Float32Array, limit: float) -> Float32Array:
        return x.clip(-limit, limit)

    def activation(self, x: Float32Array, kind: Activation) -> Float32Array:
        return self._by_rows(_ACTIVATIONS[kind], x, x.shape[1])

    def gated_activation(self, x: Float32Array, kind: Activation) -> Float32Array:
        half = x.shape[1] // 2

        def gate(rows: Float32Array) -> Float32Array:
            gated: Float32Array = _ACTIVATIONS[kind](rows[:, :half])
            gated *= rows[:, half:]
            return gated

        return self._by_rows(gate, x, half)

    def experts(self, x: Float32Array, name: str, spec: ExpertsSpec) -> Float32Array:
        probabilities = self.column_linear(x, f"{name}.router")
        softmax(probabilities)
        chosen = np.argsort(-probabilities, axis=1, kind="stable")[:, : spec.top_k]
        shares = np.take_along_axis(probabilities, chosen, axis=1)
        if spec.renormalise:
            shares /= shares.sum(axis=1, keepdims=True)
        gate_up, down = (self._weights.linear(f"{name}.{kind}") for kind in ("gate_up", "down"))
        num_held = _num_outputs(down.components) // x.shape[1]
        held = local_experts(spec.num_experts, num_held, self._comm.rank, self._comm.size)
        gates, downs = (_split(one.components, num_held) for one in (gate_up, down))
        out = np.zeros_like(x)
        for number, expert in enumerate(held):
            rows, places = np.nonzero(chosen == expert)
            if len(rows):
                hidden = gate_up.format.product(x[rows], gates[number], self._multiply)
                hidden = self.gated_activation(hidden, spec.activation)
                out[rows] += shares[rows, places, None] * down.format.product(hidden, downs[number], self._multiply)
        return out

    def sigmoid_gate(self, x: Float32Array, y: Float32Array, name: str) -> Float32Array:
        x *= np.float32(1) / (np.float32(1) + np.exp(-self.row_linear_partial(y, name)))
        return x

    def _by_rows(self, function: Callable[[Float32Array], Float32Array], x: Float32Array, width: int) -> Float32Array:
        """``function`` of each row, ``[T, D] -> [T, width]``, in pieces that stay in a core's cache."""
        rows_each = max(1, PIECE // x.shape[1])
        if len(x) <= rows_each:
            return function(x)
        out = np.empty((len(x), width), np.float32)

        def fill(rows: slice) -> None:
            out[rows] = function(x[rows])

        pieces = [slice(start, start + rows_each) for start in range(0, len(x), rows_each)]
        self._threads.run([partial(fill, piece) for piece in pieces])
        return out

    def attention(self, qkv: Float32Array, name: str, layer: int, spec: AttentionSpec) -> Float32Array:
        if spec.head_norm is not None:
            heads = self._attention.local_heads(spec)
            packed = qkv.reshape(len(qkv), -1, heads.head_dim)
            sides = (("query_norm", 0, heads.num_heads), ("key_norm", heads.num_heads, heads.num_kv_heads))
            for side, first, count in sides:
                weight, bias = self._weights.array(f"{name}.{side}"), self._weights.bias(f"{name}.{side}")
                normalise_heads(packed[:, first : first + count], weight, bias, spec.head_norm)
        return self._attention(qkv, layer, spec)

    def logits(self, x: Float32Array, name: str, soft_cap: float = 0.0) -> Float32Array:
        # The executor passes only the rows that need logits.
        if self.stop_before_logits:
            return x
        rows = self.column_linear(x, name)
        if soft_cap:
            np.tanh(rows / np.float32(soft_cap), out=rows)
            rows *= np.float32(soft_cap)
        return rows


def _num_outputs(operand: Mapping[str, NDArray[Any]]) -> int:
    return max(map(len, operand.values()))


def _split(operand: Mapping[str, NDArray[Any]], count: int) -> list[dict[str, NDArray[Any]]]:
    """Operands of ``count`` weights that are held as one; what all outputs share (``input_scale``) goes to each."""
    outputs = _num_outputs(operand)
    step = outputs // count
    return [
        {name: array[first : first + step] if len(array) == outputs else array for name, array in operand.items()}
        for first in range(0, outputs, step)
    ]


def _silu(x: Float32Array) -> Float32Array:
    denominator: Float32Array = np.exp(-np.maximum(x, np.float32(-80)))
    denominator += np.float32(1)
    return x / denominator


def _gelu_tanh(x: Float32Array) -> Float32Array:
    inner: Float32Array = x * x
    inner *= np.float32(0.044715)
    inner += np.float32(1)
    inner *= x
    inner *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += np.float32(1)
    inner *= x
    inner *= np.float32(0.5)
    return inner


def _gelu(x: Float32Array) -> Float32Array:
    return np.float32(0.5) * x * (np.float32(1) + _erf(x * np.float32(np.sqrt(0.5))))


def _erf(x: Float32Array) -> Float32Array:
    """Abramowitz & Stegun 7.1.26 in float64: absolute error below 1.5e-7."""
    a = np.abs(x.astype(np.float64))
    t: NDArray[np.float64] = 1 / (1 + 0.3275911 * a)
    poly: NDArray[np.float64] = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    magnitude: Float32Array = (1 - poly * np.exp(-a * a)).astype(np.float32)
    return np.copysign(magnitude, x)


def _relu(x: Float32Array) -> Float32Array:
    return np.maximum(x, np.float32(0))


def _relu2(x: Float32Array) -> Float32Array:
    return np.square(_relu(x))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu, "relu": _relu, "relu2": _relu2}
