# SPDX-License-Identifier: Apache-2.0
"""What is kept of the inputs of one product over a text: bounded by the product's width, whatever the text's length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEPT_ROWS", "ProductInputs"]

Float32Array = NDArray[np.float32]
KEPT_ROWS = 512
"""Rows that are kept whole to judge by."""
_LEAST_STRIDE = 8


class ProductInputs:
    """Statistics of the rows of an input ``[T, in]``, and a sample of rows that take no part in them but for `range`.

    Args:
        width: ``in``.
        num_tokens: rows that will come, so that the sample is spread over all of them.
        with_gram: sum up ``x.T @ x``, ``[in, in]`` float32, too.

    Attributes:
        amax: ``[in]`` largest magnitude of each column.
        range: the same with the rows of the sample: a static scale must not saturate on rows that were seen.
    """

    def __init__(self, width: int, num_tokens: int, with_gram: bool) -> None:
        self.amax = np.zeros(width, np.float32)
        self.range = np.zeros(width, np.float32)
        self._sum = np.zeros(width, np.float64)
        self.gram = np.zeros((width, width), np.float32) if with_gram else None
        self._stride = max(_LEAST_STRIDE, -(-num_tokens // KEPT_ROWS))
        self._kept: list[Float32Array] = []
        self._num_rows = self._num_counted = 0

    def add(self, x: Float32Array) -> None:
        """Count further rows."""
        is_kept = (np.arange(self._num_rows, self._num_rows + len(x)) % self._stride) == self._stride - 1
        self._num_rows += len(x)
        self._kept.append(x[is_kept])
        counted, all_magnitudes = x[~is_kept], np.abs(x)
        np.maximum(self.range, all_magnitudes.max(axis=0, initial=0), out=self.range)
        magnitudes = all_magnitudes[~is_kept]
        np.maximum(self.amax, magnitudes.max(axis=0, initial=0), out=self.amax)
        self._sum += magnitudes.sum(axis=0, dtype=np.float64)
        self._num_counted += len(counted)
        if self.gram is not None:
            self.gram += counted.T @ counted

    @property
    def mean(self) -> Float32Array:
        """``[in]`` mean magnitude of each column."""
        mean: Float32Array = (self._sum / max(self._num_counted, 1)).astype(np.float32)
        return mean

    @property
    def sample(self) -> Float32Array:
        """``[at most 512, in]`` rows that the statistics have not seen."""
        return np.concatenate(self._kept)
