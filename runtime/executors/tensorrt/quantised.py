# SPDX-License-Identifier: Apache-2.0
"""Products of quantised weights as layers: constants of codes, dequantised; inputs rounded to codes where the format says so.

`phalanx.checkpoints.quantization.numbers` defines the numbers. A dequantisation layer knows no zero points, and no blocks of 8-bit
codes, so these are composed: codes times one, less the zero, times the scale, in float32.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.numbers import (
    E4M3,
    E4M3_MAX,
    FP8_SMALLEST_SCALE,
    INT8_MAX,
    INT8_SMALLEST_SCALE,
    CodeKind,
)
from phalanx.checkpoints.quantization.prescale import common_prescale
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.weights import Weight

__all__ = ["QuantisedProducts"]

_FLOAT32 = np.dtype(np.float32)
_ONE = np.ones((), np.float32)


class QuantisedProducts:
    """Products by weights that are codes, as layers of ``graph``.

    Args:
        dtype: compute type.
    """

    def __init__(self, graph: Graph, dtype: np.dtype[Any]) -> None:
        self._graph, self._dtype = graph, dtype

    def product(self, x: ITensor, weight: Weight[Array]) -> ITensor:
        """Outputs ``[T, out]`` for inputs ``[T, in]`` of the compute type, without a bias.

        In float32 where inputs become codes, so that the sum is rounded once, after its scales and the bias; else in the compute type.
        """
        x = self._prescaled(x, weight)
        if isinstance(weight.format, RowCodes) and weight.format.input != "plain":
            return self._product_of_codes(x, weight, weight.format)
        if isinstance(weight.format, GroupCodes) and weight.format.input != "plain":
            x = self._rounded_by_groups(x, weight.format, weight.components["codes"].shape[1])
        return self._graph.matmul_transposed(x, self._values(weight))

    def _prescaled(self, x: ITensor, weight: Weight[Array]) -> ITensor:
        """Each column times its factor, rounded to the compute type."""
        if "prescale" not in weight.components:
            return x
        graph = self._graph
        factors = graph.constant(np.ascontiguousarray(common_prescale(weight.components["prescale"])))
        return graph.cast(graph.binary("PROD", graph.cast(x, _FLOAT32), factors), self._dtype)

    # Weights

    def _values(self, weight: Weight[Array]) -> ITensor:
        """The weight ``[out, in]`` in the compute type, each value rounded once."""
        parts, chosen = weight.components, weight.format
        assert isinstance(chosen, RowCodes | GroupCodes)
        num_rows, num_columns = parts["codes"].shape
        is_packed = chosen.kind == "int4" and not num_columns % 2
        make = self._graph.packed_codes if is_packed else self._graph.codes
        codes = make(f"{weight.name}.codes", parts["codes"])
        scale, zero = parts["scale"].reshape(num_rows, -1), parts.get("zero")
        zero = zero if zero is not None and zero.any() else None
        if isinstance(chosen, GroupCodes) and (index := chosen.column_groups(parts)) is not None:
            return self._ordered(codes, scale, zero, index)
        group = chosen.cut if isinstance(chosen, GroupCodes) else 0
        scale = _by_block(scale, group, num_columns)
        has_layer = scale.shape[1] == 1 or (is_packed and scale.shape[1] < num_columns)
        is_positive = bool((scale > 0).all())  # which the layer asks for; the rows that pad a vocabulary have none
        if zero is None and has_layer and is_positive:
            return self._dequantised(codes, scale)
        return self._blocked(codes, scale, None if zero is None else _by_block(zero, group, num_columns))

    def _dequantised(self, codes: ITensor, scale: Array) -> ITensor:
        """``codes * scale``; scales that the compute type does not hold exactly are not rounded alone."""
        with np.errstate(over="ignore"):
            rounded = scale.astype(self._dtype)
        is_exact = bool((rounded.astype(np.float32) == scale).all())
        chosen = rounded if is_exact else scale
        by_row = np.ascontiguousarray(chosen[:, 0]) if scale.shape[1] == 1 else chosen
        return self._graph.cast(self._graph.dequantize(codes, by_row), self._dtype)

    def _blocked(self, codes: ITensor, scale: Array, zero: Array | None) -> ITensor:
        """``(codes - zero) * scale`` by arithmetic; scale and zero ``[O, G]`` of equal blocks of columns."""
        graph, (num_rows, num_columns) = self._graph, codes.shape
        values = graph.reshape(graph.dequantize(codes, _ONE), (num_rows, scale.shape[1], num_columns // scale.shape[1]))
        each = [None if one is None else graph.constant(_float32(one[:, :, None])) for one in (scale, zero)]
        return graph.cast(graph.reshape(self._scaled(values, *each), (num_rows, num_columns)), self._dtype)

    def _ordered(self, codes: ITensor, scale: Array, zero: Array | None, index: Array) -> ITensor:
        """As `_blocked`, with groups of columns in any order: ``index`` ``[runs of rows, I]``."""
        each = [None if one is None else self._by_column(_float32(one), index) for one in (scale, zero)]
        return self._graph.cast(self._scaled(self._graph.dequantize(codes, _ONE), *each), self._dtype)

    def _scaled(self, codes: ITensor, scale: ITensor | None, zero: ITensor | None) -> ITensor:
        values = codes if zero is None else self._graph.binary("SUB", codes, zero)
        return self._graph.binary("PROD", values, scale)

    def _by_column(self, groups: Array, index: Array) -> ITensor:
        """Values of groups ``[O, G]`` for the columns ``[O, I]``, gathered by the engine: once for all neighbouring rows whose order is the same."""
        graph, rows = self._graph, len(groups) // len(index)
        changes = np.flatnonzero((index[1:] != index[:-1]).any(axis=1)) + 1
        parts = []
        for start, stop in pairwise([0, *changes.tolist(), len(index)]):
            some = graph.constant(np.ascontiguousarray(groups[start * rows : stop * rows]))
            parts.append(graph.gather(some, graph.constant(np.ascontiguousarray(index[start])), axis=1))
        return graph.joined(parts, axis=0)

    # Inputs

    def _product_of_codes(self, x: ITensor, weight: Weight[Array], chosen: RowCodes) -> ITensor:
        """``(sum of code products) * scale of the token * scale of the row`` in float32."""
        graph, parts = self._graph, weight.components
        inverse, scale = self._input_scale(x, chosen, parts)
        inputs = self._as_codes(graph.binary("PROD", graph.cast(x, _FLOAT32), inverse), chosen.kind)
        sums = graph.matmul_transposed(
            inputs, graph.dequantize(graph.codes(f"{weight.name}.codes", parts["codes"]), _ONE)
        )
        rows = graph.constant(np.ascontiguousarray(parts["scale"][None]))
        return graph.binary("PROD", graph.binary("PROD", sums, scale), rows)

    def _input_scale(self, x: ITensor, chosen: RowCodes, parts: Any) -> tuple[ITensor, ITensor]:
        """What inputs are multiplied by to become codes, and its inverse, each ``[T, 1]`` or ``[1, 1]``."""
        if chosen.input == "static":
            scale = np.float32(parts["input_scale"].max())  # q, k and v see one input
            return self._graph.scalar(float(np.float32(1) / scale), 2), self._graph.scalar(float(scale), 2)
        scales = self._token_scale(x, chosen.kind, chosen.input_ceiling)
        return self._inverse(scales), scales

    def _token_scale(self, x: ITensor, kind: CodeKind, ceiling: float = math.inf) -> ITensor:
        """From the largest magnitude along the last axis: ``[T, 1]``, of groups ``[T, G, 1]``."""
        graph, num_dims = self._graph, len(x.shape)
        largest, smallest = (E4M3_MAX, FP8_SMALLEST_SCALE) if kind == "fp8" else (INT8_MAX, INT8_SMALLEST_SCALE)
        amax = graph.cast(graph.largest_magnitudes(x), _FLOAT32)
        if ceiling < math.inf:
            amax = graph.binary("MIN", amax, graph.scalar(ceiling, num_dims))
        scale = graph.binary("DIV", amax, graph.scalar(largest, num_dims))
        return graph.binary("MAX", scale, graph.scalar(float(smallest), num_dims))

    def _inverse(self, scale: ITensor) -> ITensor:
        return self._graph.binary("DIV", self._graph.scalar(1.0, len(scale.shape)), scale)

    def _power_of_two(self, scale: ITensor) -> ITensor:
        """The smallest power of two that is not below each of ``[T, G, 1]``: the largest whose half is below it, which needs no logarithm."""
        widest = np.float16 if self._dtype == np.float16 else np.float32  # bfloat16 has the range of float32
        largest = float(np.finfo(widest).max) / E4M3_MAX
        exponents = range(math.ceil(math.log2(FP8_SMALLEST_SCALE)), math.ceil(math.log2(largest)) + 1)
        powers = np.array([*(2.0**exponent for exponent in exponents), np.inf], np.float32).reshape(1, 1, -1)
        halves = np.array([0.0, *powers[0, 0, :-1]], np.float32).reshape(1, 1, -1)
        graph = self._graph
        is_below = graph.binary("GREATER", scale, graph.constant(halves))
        return graph.largest_magnitudes(graph.select(is_below, graph.constant(powers), graph.scalar(0.0, 3)))

    def _as_codes(self, scaled: ITensor, kind: CodeKind) -> ITensor:
        """Values of codes, float32."""
        return self._graph.dequantize(self._graph.quantize(scaled, E4M3 if kind == "fp8" else np.dtype(np.int8)), _ONE)

    def _rounded_by_groups(self, x: ITensor, chosen: GroupCodes, num_columns: int) -> ITensor:
        """What fp8 codes with a scale for each group of a token's columns stand for, rounded to the compute type: ``[T, in]``."""
        graph, group = self._graph, chosen.group
        whole = num_columns // group * group
        num_tokens = graph.extent(graph.shape(x), 0)
        parts = []
        for start, width, size in ((0, whole, group), (whole, num_columns - whole, num_columns - whole)):
            if width:
                columns = graph.columns(x, start, graph.extents(num_tokens, width))
                blocks = graph.reshape(columns, (-1, width // size, size))
                scale = self._token_scale(blocks, "fp8")
                if chosen.has_power_of_two_inputs:
                    scale = self._power_of_two(scale)
                inverse = self._inverse(scale)
                codes = self._as_codes(graph.binary("PROD", graph.cast(blocks, _FLOAT32), inverse), "fp8")
                parts.append(graph.reshape(graph.binary("PROD", codes, scale), (-1, width)))
        return graph.cast(graph.joined(parts, axis=1), self._dtype)


def _float32(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


def _by_block(groups: Array, group: int, num_columns: int) -> Array:
    """Values of groups ``[O, G]`` for equal blocks of columns, contiguous: the last group may be short; ``group`` 0 = all columns."""
    block = math.gcd(group, num_columns) if group else num_columns
    return np.ascontiguousarray(np.repeat(groups, group // block or 1, axis=1)[:, : num_columns // block])
