# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as layers: constants of codes, and what makes values of them.

A dequantisation layer knows no zero points, and blocks of 8-bit codes are not documented, so these are composed: codes times one,
less the zero, times the scale, in float32.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import ITensor
from phalanx.runtime.executors.weights import Weight

__all__ = ["WeightCodes"]

_ONE = np.ones((), np.float32)


class WeightCodes:
    """Weights that are codes, in ``graph``.

    Args:
        dtype: compute type.
    """

    def __init__(self, graph: Graph, dtype: np.dtype[Any]) -> None:
        self._graph, self._dtype = graph, dtype

    def codes(self, weight: Weight[Array]) -> ITensor:
        """The codes themselves, ``[out, in]`` float32."""
        return self._graph.dequantize(self._constant(weight), _ONE)

    def values(self, weight: Weight[Array]) -> ITensor:
        """What the codes stand for, ``[out, in]`` in the compute type; each value is rounded once.

        Raises:
            CheckpointError: a column is in a group that does not exist.
        """
        parts, chosen = weight.components, weight.format
        num_rows, num_columns = parts["codes"].shape
        scale, zero = parts["scale"].reshape(num_rows, -1), parts.get("zero")
        zero = zero if zero is not None and zero.any() else None
        if isinstance(chosen, GroupCodes) and (index := chosen.column_groups(parts)) is not None:
            return self._ordered(self.codes(weight), scale, zero, index)
        group = chosen.cut if isinstance(chosen, GroupCodes) else 0
        scale = _by_block(scale, group, num_columns)
        if zero is None and (scale > 0).all() and (scale.shape[1] == 1 or _has_blocks(weight, scale)):
            return self._dequantised(self._constant(weight), scale)
        return self._blocked(self.codes(weight), scale, None if zero is None else _by_block(zero, group, num_columns))

    def _constant(self, weight: Weight[Array]) -> ITensor:
        make = self._graph.packed_codes if _is_packed(weight) else self._graph.codes
        return make(f"{weight.name}.codes", weight.components["codes"])

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
        values = graph.reshape(codes, (num_rows, scale.shape[1], num_columns // scale.shape[1]))
        each = [None if one is None else graph.constant(_float32(one[:, :, None])) for one in (scale, zero)]
        return graph.cast(graph.reshape(self._scaled(values, *each), (num_rows, num_columns)), self._dtype)

    def _ordered(self, codes: ITensor, scale: Array, zero: Array | None, index: Array) -> ITensor:
        """As `_blocked`, with groups of columns in any order: ``index`` ``[runs of rows, I]``."""
        each = [None if one is None else self._by_column(_float32(one), index) for one in (scale, zero)]
        return self._graph.cast(self._scaled(codes, *each), self._dtype)

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


def _is_packed(weight: Weight[Array]) -> bool:
    """Whether two codes share a byte."""
    assert isinstance(weight.format, RowCodes | GroupCodes)
    return weight.format.kind == "int4" and not weight.components["codes"].shape[1] % 2


def _has_blocks(weight: Weight[Array], scale: Array) -> bool:
    """Whether a dequantisation layer takes scales ``[O, G]`` of blocks, which have two columns at least."""
    return _is_packed(weight) and scale.shape[1] < weight.components["codes"].shape[1]


def _float32(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


def _by_block(groups: Array, group: int, num_columns: int) -> Array:
    """Values of groups ``[O, G]`` for equal blocks of columns, contiguous: the last group may be short; ``group`` 0 = all columns."""
    block = math.gcd(group, num_columns) if group else num_columns
    return np.ascontiguousarray(np.repeat(groups, group // block or 1, axis=1)[:, : num_columns // block])
