# SPDX-License-Identifier: Apache-2.0
"""A segment as a TensorRT network: inputs ``x.0``, ``x.1``, ... ``[T, D]`` and one a weight, outputs ``y.0``, ``y.1``, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.layers import TrtLayers
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.tensorrt.segments.program import Segment

__all__ = ["input_name", "output_name", "write_segment"]


def input_name(index: int) -> str:
    """The network's name of a segment's input."""
    return f"x.{index}"


def output_name(index: int) -> str:
    """The network's name of a segment's output."""
    return f"y.{index}"


def write_segment(graph: Graph, segment: Segment, dtype: np.dtype[Any]) -> None:
    """Write ``segment`` into the empty ``graph``.

    Raises:
        ExecutorError: TensorRT refused a layer.
    """
    values = [graph.input(input_name(index), dtype, (-1, width)) for index, width in enumerate(segment.widths)]
    num_tokens = graph.extent(graph.shape(values[0]), 0)
    weights = {name: graph.input(name, dtype, _as_matrix(shape)) for name, shape in segment.weights}
    layers = TrtLayers(graph, _Inputs(graph, weights), dtype, num_tokens)
    for call in segment.calls:
        assert call.output == len(values)
        operands = [values[number] for number in call.inputs] + [call.name] * bool(call.name)
        values.append(getattr(layers, call.operation)(*operands, *call.options))
    for index, value in enumerate(segment.outputs):
        graph.output(output_name(index), values[value.number], dtype)


class _Inputs:
    """Weights that are inputs of the network; see `phalanx.runtime.executors.tensorrt.layers.Parameters`."""

    def __init__(self, graph: Graph, tensors: Mapping[str, ITensor]) -> None:
        self._graph, self._tensors = graph, tensors

    def matrix(self, name: str) -> ITensor:
        """``[out, in]``."""
        return self._tensors[f"{name}.weight"]

    def product(self, x: ITensor, name: str) -> ITensor:
        return self._graph.matmul_transposed(x, self.matrix(name))

    def row(self, name: str, kind: str) -> ITensor | None:
        """``[1, D]``; None if the segment has none."""
        return self._tensors.get(f"{name}.{kind}")


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 2 else (1, *shape)
