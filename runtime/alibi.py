# SPDX-License-Identifier: Apache-2.0
"""Slopes of linear position biases (Press et al. 2022), as data for `phalanx.runtime.attention.AttentionSpec`."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["alibi_slopes"]


@lru_cache
def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """``H`` slopes: a geometric series ending at ``2^-bias_max``; heads beyond a power of two take every other term of the
    series for twice as many heads."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-bias_max / power * term) for term in range(1, power + 1)]
    extra = [2.0 ** (-bias_max / 2 / power * term) for term in range(1, 2 * (num_heads - power) + 1, 2)]
    return (*slopes, *extra)
