import numpy as np
import pytest

from phalanx.kernels.norm import layer_norm, rms_norm

from .devices import cases
from .tolerance import assert_close

SIZES = cases((1, 64), (3, 2048), (2, 4096), (5, 33), (2, 1600), (2, 3073))
WITH_AND_WITHOUT_BIAS = [*((*case, False) for case in SIZES), *((*case, True) for case in SIZES[:4])]
EPSILON = 1e-5


def added(dtype, *terms):
    """The sum in float64, rounded to storage: what the kernel leaves in the residual and normalises."""
    total = sum(term.astype(np.float64) for term in terms)
    return total, total.astype(np.float32).astype(dtype).astype(np.float64)


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_rms_norm_equals_float64(device, random_normal, dtype, num_tokens, hidden_size, weight_offset):
    x, weight = random_normal(dtype, num_tokens, hidden_size, scale=3.0), random_normal(dtype, hidden_size)
    out = device.poisoned(x.shape, dtype)
    rms_norm(device.library, device.put(x), device.put(weight), out, epsilon=EPSILON, weight_offset=weight_offset)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * (weight_offset + weight.astype(np.float64))
    assert_close(device.get(out), expected)


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_rms_norm_adds_the_residual_once(device, random_normal, dtype, num_tokens, hidden_size):
    x, residual = (random_normal(dtype, num_tokens, hidden_size) for _ in range(2))
    weight = random_normal(dtype, hidden_size)
    out, carried = device.put(x), device.put(residual)  # out aliases x
    rms_norm(device.library, out, device.put(weight), out, epsilon=EPSILON, residual=carried)
    assert_close(device.get(carried), added(dtype, x, residual)[0])
    stored = device.get(carried).astype(np.float64)
    expected = stored / np.sqrt((stored**2).mean(-1, keepdims=True) + EPSILON) * weight.astype(np.float64)
    assert_close(device.get(out), expected)


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size", "has_bias"), WITH_AND_WITHOUT_BIAS)
def test_layer_norm_does_not_cancel_under_a_large_mean(device, random_normal, dtype, num_tokens, hidden_size, has_bias):
    x = (random_normal(np.float64, num_tokens, hidden_size) + 30.0).astype(dtype)
    residual = random_normal(dtype, num_tokens, hidden_size)
    weight, bias = (random_normal(dtype, hidden_size) for _ in range(2))
    out, carried = device.poisoned(x.shape, dtype), device.put(residual)
    layer_norm(
        device.library, device.put(x), device.put(weight), device.put(bias) if has_bias else None, out,
        epsilon=EPSILON, weight_offset=0.5, residual=carried,
    )  # fmt: skip
    assert_close(device.get(carried), added(dtype, x, residual)[0])
    stored = device.get(carried).astype(np.float64)
    centred = stored - stored.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * (0.5 + weight.astype(np.float64))
    expected = expected + (bias.astype(np.float64) if has_bias else 0.0)
    magnitude = np.abs(stored).max() * np.abs(0.5 + weight.astype(np.float64)).max()
    assert_close(device.get(out), expected, magnitude=magnitude)
