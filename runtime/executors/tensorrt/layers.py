# SPDX-License-Identifier: Apache-2.0
"""Operations that neither read the step nor cross ranks, as layers of a network: norms, products, activations, sums.

Tensors are ``[T, D]`` in the compute type. Norms and scaling are done in float32, as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from phalanx.checkpoints.formats import DENSE
from phalanx.runtime.config import Activation
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.tensorrt.quantised import QuantisedProducts
from phalanx.runtime.executors.weights import Weights

__all__ = ["Constants", "Parameters", "TrtLayers"]

_FLOAT32 = np.dtype(np.float32)
_ACTIVATIONS: Mapping[Activation, str] = {"gelu_tanh": "GELU_TANH", "gelu": "GELU_ERF", "relu": "RELU"}


class Parameters(Protocol):
    """A rank's weights as tensors of one network, by the names that models use."""

    def matrix(self, name: str) -> ITensor:
        """The weight ``[out, in]``, or a table of rows."""
        ...

    def product(self, x: ITensor, name: str) -> ITensor:
        """``x [T, in]`` by the weight: ``[T, out]`` without a bias, in the compute type or in float32."""
        ...

    def row(self, name: str, kind: str) -> ITensor | None:
        """A ``weight`` or ``bias`` of one axis as ``[1, D]``; None if there is none."""
        ...


class Constants:
    """Weights that are part of the network; see `Parameters`. The graph keeps their memory."""

    def __init__(self, graph: Graph, weights: Weights[Array], dtype: np.dtype[Any]) -> None:
        self._graph, self._weights, self._quantised = graph, weights, QuantisedProducts(graph, dtype)

    def matrix(self, name: str) -> ITensor:
        """A constant of the array's own shape."""
        return self._graph.weight(f"{name}.weight", self._weights.array(name))

    def product(self, x: ITensor, name: str) -> ITensor:
        weight = self._weights.linear(name)
        if weight.format == DENSE:
            return self._graph.matmul_transposed(x, self.matrix(name))
        return self._quantised.product(x, weight)

    def row(self, name: str, kind: str) -> ITensor | None:
        """A constant of one row."""
        array = self._weights.norm(name)[0] if kind == "weight" else self._weights.bias(name)
        return None if array is None else self._graph.weight(f"{name}.{kind}", array, (1, array.size))


class TrtLayers:
    """Methods of `Ops` as layers of ``graph``.

    Args:
        dtype: compute type.
        num_tokens: T, as a shape tensor of one element.
    """

    def __init__(self, graph: Graph, parameters: Parameters, dtype: np.dtype[Any], num_tokens: ITensor) -> None:
        self._graph, self._parameters, self._dtype, self._num_tokens = graph, parameters, dtype, num_tokens
        self._shapes: dict[tuple[str, int, int], ITensor] = {}

    def rms_norm(self, x: ITensor, name: str, eps: float, weight_offset: float = 0.0) -> ITensor:
        graph, weight = self._graph, self._float32_row(name, "weight")
        if weight_offset:
            weight = graph.binary("SUM", weight, graph.scalar(weight_offset, 2))

        def normalise(x: ITensor) -> ITensor:
            variance = graph.binary("SUM", graph.mean_square(x), graph.scalar(eps, 2))
            return graph.binary("PROD", graph.binary("DIV", x, graph.unary("SQRT", variance)), weight)

        return self._in_float32(x, normalise)

    def layer_norm(self, x: ITensor, name: str, eps: float, weight_offset: float = 0.0) -> ITensor:
        graph, width = self._graph, x.shape[1]
        weight, bias = (self._parameters.row(name, kind) for kind in ("weight", "bias"))
        scale = graph.constant(np.ones((1, width), np.float32)) if weight is None else graph.cast(weight, _FLOAT32)
        if weight is not None and weight_offset:
            scale = graph.binary("SUM", scale, graph.scalar(weight_offset, 2))
        shift = graph.constant(np.zeros((1, width), np.float32)) if bias is None else graph.cast(bias, _FLOAT32)
        if graph.library.has_fused_layers:
            return self._in_float32(x, lambda x: graph.layer_norm(x, scale, shift, eps))

        def normalise(x: ITensor) -> ITensor:
            centred = graph.binary("SUB", x, graph.mean(x))
            variance = graph.binary("SUM", graph.mean_square(centred), graph.scalar(eps, 2))
            factor = graph.binary("DIV", centred, graph.unary("SQRT", variance))
            return graph.binary("SUM", graph.binary("PROD", factor, scale), shift)

        return self._in_float32(x, normalise)

    def column_linear(self, x: ITensor, name: str) -> ITensor:
        graph, product = self._graph, self._parameters.product(x, name)
        bias = self._parameters.row(name, "bias")
        return graph.cast(product if bias is None else self.add(product, graph.cast_like(bias, product)), self._dtype)

    def row_linear_partial(self, x: ITensor, name: str) -> ITensor:
        return self._graph.cast(self._parameters.product(x, name), self._dtype)

    def add_bias(self, x: ITensor, name: str) -> ITensor:
        bias = self._parameters.row(name, "bias")
        return x if bias is None else self.add(x, bias)

    def logits(self, x: ITensor, name: str, soft_cap: float = 0.0) -> ITensor:
        # Only the rows that need logits come here.
        rows = self.column_linear(x, name)
        if not soft_cap:
            return rows
        graph, cap = self._graph, self._graph.scalar(soft_cap, 2)
        return self._in_float32(
            rows, lambda x: graph.binary("PROD", graph.activation("TANH", graph.binary("DIV", x, cap)), cap)
        )

    def add(self, x: ITensor, y: ITensor) -> ITensor:
        return self._graph.binary("SUM", x, y)

    def scale(self, x: ITensor, factor: float) -> ITensor:
        return self._in_float32(x, lambda x: self._times(x, factor))

    def clip(self, x: ITensor, limit: float) -> ITensor:
        graph = self._graph
        high, low = (graph.cast(graph.scalar(value, 2), self._dtype) for value in (limit, -limit))
        return graph.binary("MAX", graph.binary("MIN", x, high), low)

    def sigmoid_gate(self, x: ITensor, y: ITensor, name: str) -> ITensor:
        gate = self._graph.activation("SIGMOID", self.row_linear_partial(y, name))
        return self._graph.binary("PROD", x, gate)

    def activation(self, x: ITensor, kind: Activation) -> ITensor:
        if kind == "relu2":
            positive = self._graph.activation("RELU", x)
            return self._graph.binary("PROD", positive, positive)
        if kind == "silu":
            return self._graph.binary("PROD", x, self._graph.activation("SIGMOID", x))
        if kind == "relu" or self._graph.library.has_fused_layers:
            return self._graph.activation(_ACTIVATIONS[kind], x)
        return self._in_float32(x, self._gelu_tanh if kind == "gelu_tanh" else self._gelu)

    def gated_activation(self, x: ITensor, kind: Activation) -> ITensor:
        width = x.shape[1] // 2
        gate, up = (self._columns(x, start, width) for start in (0, width))
        return self._graph.binary("PROD", self.activation(gate, kind), up)

    def _gelu_tanh(self, x: ITensor) -> ITensor:
        """``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (Hendrycks & Gimpel 2016)."""
        graph = self._graph
        cube = graph.binary("PROD", graph.binary("PROD", x, x), x)
        inner = graph.binary("SUM", x, graph.binary("PROD", cube, graph.scalar(0.044715, 2)))
        return self._gated_half(x, graph.activation("TANH", self._times(inner, math.sqrt(2 / math.pi))))

    def _gelu(self, x: ITensor) -> ITensor:
        """``x / 2 (1 + erf(x / sqrt(2)))`` (Hendrycks & Gimpel 2016)."""
        return self._gated_half(x, self._graph.unary("ERF", self._times(x, math.sqrt(0.5))))

    def _gated_half(self, x: ITensor, gate: ITensor) -> ITensor:
        """``x / 2 (1 + gate)``."""
        graph = self._graph
        return graph.binary("PROD", self._times(x, 0.5), graph.binary("SUM", gate, graph.scalar(1.0, 2)))

    def _times(self, x: ITensor, factor: float) -> ITensor:
        return self._graph.binary("PROD", x, self._graph.scalar(factor, 2))

    def _float32_row(self, name: str, kind: str) -> ITensor:
        return self._graph.cast(self._parameters.row(name, kind), _FLOAT32)

    def _columns(self, x: ITensor, start: int, width: int) -> ITensor:
        key = ("columns", width, 0)
        if key not in self._shapes:
            self._shapes[key] = self._graph.extents(self._num_tokens, width)
        return self._graph.columns(x, start, self._shapes[key])

    def _in_float32(self, x: ITensor, compute: Callable[[ITensor], ITensor]) -> ITensor:
        """``compute`` in float32, the result in the compute type."""
        return self._graph.cast(compute(self._graph.cast(x, _FLOAT32)), self._dtype)
