# SPDX-License-Identifier: Apache-2.0
"""Inputs of products as codes: scales from their largest magnitudes, rounding, and the values that codes stand for, as layers.

A quantisation layer divides by its scale, where the definition multiplies by its inverse; so the layers here have a scale of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import ITensor

__all__ = ["InputCodes"]

_FLOAT32 = np.dtype(np.float32)
_ONE = np.ones((), np.float32)


class InputCodes:
    """Codes of activations, in ``graph``.

    Args:
        dtype: compute type.
    """

    def __init__(self, graph: Graph, dtype: np.dtype[Any]) -> None:
        self._graph, self._dtype = graph, dtype

    def codes(self, x: ITensor, chosen: RowCodes, components: Mapping[str, Array]) -> tuple[ITensor, ITensor]:
        """Codes of ``x`` ``[T, in]``, and the scales of what they stand for, ``[T, 1]`` or ``[1, 1]``, all float32.

        ``components``: of the weight, which holds the scale of static inputs.
        """
        if chosen.input == "static":
            largest = np.float32(components["input_scale"].max())  # q, k and v see one input
            scale = self._graph.scalar(float(largest), 2)
            inverse = self._graph.scalar(float(np.float32(1) / largest), 2)
        else:
            scale = self._token_scale(x, chosen.kind, chosen.input_ceiling)
            inverse = self._inverse(scale)
        return self._rounded(x, inverse, chosen.kind), scale

    def rounded_by_groups(self, x: ITensor, chosen: GroupCodes, num_columns: int) -> ITensor:
        """What fp8 codes with a scale for each group of a token's columns stand for, rounded to the compute type: ``[T, in]``."""
        graph, whole = self._graph, num_columns // chosen.group * chosen.group
        num_tokens = graph.extent(graph.shape(x), 0)
        parts = []
        for start, width, size in ((0, whole, chosen.group), (whole, num_columns - whole, num_columns - whole)):
            if width:
                columns = graph.columns(x, start, graph.extents(num_tokens, width))
                blocks = graph.reshape(columns, (-1, width // size, size))
                parts.append(graph.reshape(self._rounded_blocks(blocks, chosen), (-1, width)))
        return graph.cast(graph.joined(parts, axis=1), self._dtype)

    def _rounded_blocks(self, blocks: ITensor, chosen: GroupCodes) -> ITensor:
        """The same of whole groups ``[T, G, g]``, float32."""
        scale = self._token_scale(blocks, "fp8")
        if chosen.has_power_of_two_inputs:
            scale = self._power_of_two(scale)
        return self._graph.binary("PROD", self._rounded(blocks, self._inverse(scale), "fp8"), scale)

    def _rounded(self, x: ITensor, inverse: ITensor, kind: CodeKind) -> ITensor:
        """Codes of ``x * inverse``, as float32."""
        graph, dtype = self._graph, E4M3 if kind == "fp8" else np.dtype(np.int8)
        return graph.dequantize(graph.quantize(graph.binary("PROD", graph.cast(x, _FLOAT32), inverse), dtype), _ONE)

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
