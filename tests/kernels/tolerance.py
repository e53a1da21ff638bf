"""How far a kernel may be from float64: the written table.

A kernel computes in float32 and rounds once to its storage dtype. So its error is at most half a unit in the last place of
storage (``rtol``) plus what float32 arithmetic loses, which is bounded against the largest value of a row (``atol`` times
the largest reference value).

| dtype    | rtol           | atol / max(abs(reference)) | from                                              |
|----------|----------------|----------------------------|---------------------------------------------------|
| float32  | 2 ** -20       | 2 ** -21                   | a few float32 roundings, fast exp and reciprocals |
| float16  | 2 ** -11 * 1.02 | 2 ** -19                  | one rounding of an 11-bit significand             |
| bfloat16 | 2 ** -8 * 1.02  | 2 ** -19                  | one rounding of an 8-bit significand              |
"""

from __future__ import annotations

import numpy as np

RTOL = {"float32": 2.0**-20, "float16": 1.02 * 2.0**-11, "bfloat16": 1.02 * 2.0**-8}
ATOL = {"float32": 2.0**-21, "float16": 2.0**-19, "bfloat16": 2.0**-19}


def assert_close(result: np.ndarray, reference: np.ndarray, magnitude: float | None = None) -> None:
    """``result`` in its storage dtype against a float64 ``reference``.

    ``magnitude`` stands for ``max(abs(reference))`` where the result is a difference of larger terms.
    """
    assert result.shape == reference.shape
    assert reference.dtype == np.float64
    assert reference.size, "an empty comparison shows nothing"
    name = result.dtype.name
    wide = result.astype(np.float64)
    limit = RTOL[name] * np.abs(reference) + ATOL[name] * (magnitude or np.abs(reference).max())
    worst = np.argmax(np.where(np.isnan(wide), np.inf, np.abs(wide - reference) - limit))
    assert np.all(np.abs(wide - reference) <= limit), (
        f"{name} element {np.unravel_index(worst, reference.shape)}: {wide.flat[worst]!r} for "
        f"{reference.flat[worst]!r}, limit {limit.flat[worst]:.3g}"
    )
