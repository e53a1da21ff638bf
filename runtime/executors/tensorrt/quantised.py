# SPDX-License-Identifier: Apache-2.0
"""Products of quantised weights as layers of a network.

`phalanx.checkpoints.quantization.numbers` defines the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.prescale import common_prescale
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.input_codes import InputCodes
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.tensorrt.weight_codes import WeightCodes
from phalanx.runtime.executors.weights import Weight

__all__ = ["QuantisedProducts"]

_FLOAT32 = np.dtype(np.float32)


class QuantisedProducts:
    """Products by weights that are codes, as layers of ``graph``.

    Args:
        dtype: compute type.
    """

    def __init__(self, graph: Graph, dtype: np.dtype[Any]) -> None:
        self._graph, self._dtype = graph, dtype
        self._weights, self._inputs = WeightCodes(graph, dtype), InputCodes(graph, dtype)

    def product(self, x: ITensor, weight: Weight[Array]) -> ITensor:
        """Outputs ``[T, out]`` for inputs ``[T, in]`` of the compute type, without a bias.

        In float32 where inputs become codes, so that the sum is rounded once, after its scales and the bias; else in the compute type.
        """
        x = self._prescaled(x, weight)
        if isinstance(weight.format, RowCodes) and weight.format.input != "plain":
            return self._product_of_codes(x, weight, weight.format)
        if isinstance(weight.format, GroupCodes) and weight.format.input != "plain":
            x = self._inputs.rounded_by_groups(x, weight.format, weight.components["codes"].shape[1])
        return self._graph.matmul_transposed(x, self._weights.values(weight))

    def _prescaled(self, x: ITensor, weight: Weight[Array]) -> ITensor:
        """Each column times its factor, rounded to the compute type."""
        if "prescale" not in weight.components:
            return x
        graph = self._graph
        factors = graph.constant(np.ascontiguousarray(common_prescale(weight.components["prescale"])))
        return graph.cast(graph.binary("PROD", graph.cast(x, _FLOAT32), factors), self._dtype)

    def _product_of_codes(self, x: ITensor, weight: Weight[Array], chosen: RowCodes) -> ITensor:
        """``(sum of code products) * scale of the token * scale of the row`` in float32."""
        graph = self._graph
        inputs, scale = self._inputs.codes(x, chosen, weight.components)
        sums = graph.matmul_transposed(inputs, self._weights.codes(weight))
        rows = graph.constant(np.ascontiguousarray(weight.components["scale"][None]))
        return graph.binary("PROD", graph.binary("PROD", sums, scale), rows)
