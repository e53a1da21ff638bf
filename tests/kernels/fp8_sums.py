"""How far tensor cores that add fp8 products with 13 bits may be from the exact sum, and a simulation of such cores.

Hopper's fp8 instructions align 32 products and the accumulator to the largest of them and cut each to 13 bits of mantissa (DeepSeek-V3,
arXiv:2412.19437, section 3.3.2); cuBLASLt does so over the whole of k with `FAST_ACCUM`, as we set it. With q the last place that is kept in
a step:

- the accumulator loses less than q, always towards zero: less than the sum of all q;
- each product loses between 0 and q, towards zero, too. Signs of products are independent of each other, so these errors have no mean,
  and Hoeffding's inequality bounds their sum: with probability 1 - 2 exp(-t) it stays below sqrt(t / 2 * 32 * sum of q^2).

What does not hold for products of one sign (probabilities times values): those are added in float32 here, from float16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MANTISSA_BITS", "STEP", "simulated_sum", "sum_bound"]

Float64Array = NDArray[np.float64]

MANTISSA_BITS = 13
STEP = 32
"""Products that an instruction adds at a time."""
_T = 50.0
"""One in 10^21 sums may be further away: no test sees one."""


def sum_bound(x: Float64Array, weight: Float64Array) -> Float64Array:
    """``[T, O]``: bound on the error of ``x @ weight.T`` for x ``[T, I]`` and weight ``[O, I]``, added in order of k.

    Kernels that share k among warps add shorter sums, which are no further away, in another order, which is as likely.
    """
    total = np.zeros((len(x), len(weight)))
    steps, squares = np.zeros_like(total), np.zeros_like(total)
    for start in range(0, x.shape[1], STEP):
        left, right = x[:, start : start + STEP], weight[:, start : start + STEP]
        before, total = total, total + left @ right.T
        largest_product = np.abs(left).max(axis=1)[:, None] * np.abs(right).max(axis=1)
        place = 2.0**-MANTISSA_BITS * np.maximum(np.maximum(np.abs(before), np.abs(total)), largest_product)
        steps += place
        squares += place**2
    bound: Float64Array = steps + np.sqrt(_T / 2 * STEP * squares)
    return bound


def simulated_sum(x: Float64Array, weight: Float64Array) -> Float64Array:
    """``x @ weight.T`` as such a tensor core adds it."""
    total = np.zeros((len(x), len(weight)))
    for start in range(0, x.shape[1], STEP):
        products = x[:, None, start : start + STEP] * weight[None, :, start : start + STEP]
        terms = np.concatenate((products, total[:, :, None]), axis=2)
        largest = np.abs(terms).max(axis=2, keepdims=True)
        place = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - MANTISSA_BITS)
        total = (np.trunc(terms / place) * place).sum(axis=2)
    return total
