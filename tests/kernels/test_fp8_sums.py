"""The bound that products of fp8 codes are held to on a GPU holds for a simulated tensor core, and is not far from what it does."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import quantize_rows

from .fp8_sums import simulated_sum, sum_bound


@pytest.mark.parametrize("columns", [96, 688, 4096, 14336])
def test_sums_with_13_bits_stay_within_the_bound_and_use_some_of_it(columns: int) -> None:
    random = np.random.default_rng(columns)
    x, weight = (
        quantize_rows(random.standard_normal((rows, columns), np.float32)).codes.astype(np.float64) for rows in (6, 20)
    )
    exact = x @ weight.T
    error = np.abs(simulated_sum(x, weight) - exact)
    bound = sum_bound(x, weight)
    assert (error <= bound).all()
    assert error.max() > 0.02 * bound.max()
    assert np.median(bound) < 0.1 * exact.std()


def test_products_of_one_sign_drift_further_than_it_allows() -> None:
    """Why attention's probabilities are not fp8: their errors have one sign and do not cancel."""
    x, weight = (np.full((1, 4096), value) for value in (1.0, 1.0625))
    assert abs(simulated_sum(x, weight)[0, 0] / 4352 - 1) > 0.001
