# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, and those to come make up for each one's error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.scheme import Scheme

__all__ = ["Spread", "gptq"]

Float32Array = NDArray[np.float32]
_BLOCK = 128
"""Columns after which the errors of a block reach the rest in one product."""
_DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class Spread:
    """How the error of one column is made up for by those rounded after it.

    Attributes:
        order: ``[in]`` columns from the largest inputs to the smallest: the first have the most others left to help.
        factor: ``[in, in]`` in that order, upper triangular: the Cholesky factor of the inverse of ``x.T @ x``.
    """

    order: NDArray[np.intp]
    factor: Float32Array

    @classmethod
    def of(cls, gram: Float32Array) -> Spread:
        """From ``x.T @ x`` ``[in, in]``; 1 % of its mean diagonal is added. Columns that are always zero count as independent."""
        order = np.argsort(-np.diagonal(gram), kind="stable")
        hessian = gram[np.ix_(order, order)].astype(np.float64)
        diagonal = np.einsum("ii->i", hessian)
        diagonal[diagonal == 0] = 1.0
        diagonal += _DAMPING * diagonal.mean()
        factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
        return cls(order, np.ascontiguousarray(factor))


def gptq(weight: Float32Array, spread: Spread, scheme: Scheme) -> tuple[NDArray[np.int8], Float32Array, Float32Array]:
    """Codes ``[out, in]``, scales ``[out, groups]`` and the values that they stand for.

    Scales are those of rounding to nearest, so the order of columns leaves no trace in what is stored.

    Args:
        weight: ``[out, in]``.
        spread: of the inputs.
        scheme: one of integer codes.
    """
    num_rows, columns = weight.shape
    scales = scheme.integer_scale(weight.reshape(num_rows, -1, scheme.group_size or columns))
    each = np.repeat(scales, columns // scales.shape[1], axis=1)[:, spread.order]
    rest = weight[:, spread.order]
    rounded = np.empty_like(rest)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = np.empty((num_rows, stop - start), np.float32)
        for column in range(start, stop):
            later = spread.factor[column, column:stop]
            rounded[:, column] = scheme.integers(rest[:, column], each[:, column])
            error = (rest[:, column] - rounded[:, column] * each[:, column]) / later[0]
            rest[:, column + 1 : stop] -= np.outer(error, later[1:])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ spread.factor[start:stop, stop:]
    codes, values = np.empty(weight.shape, np.int8), np.empty_like(weight)
    codes[:, spread.order], values[:, spread.order] = rounded, rounded * each
    return codes, scales, values
