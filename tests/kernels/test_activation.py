import numpy as np
import pytest

from phalanx.kernels.activation import activation, gated_activation
from phalanx.kernels.activation_names import ACTIVATIONS
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, cases
from .tolerance import assert_close

SIZES = cases((1, 64), (3, 2816), (5, 33), (2, 4100))


def reference(name, x):
    import math

    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if name == "gelu_erf":
        return 0.5 * x * np.vectorize(math.erfc)(-x / np.sqrt(2))
    return np.maximum(x, 0.0) ** (2 if name == "relu2" else 1)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("dtype", "num_tokens", "features"), SIZES)
def test_gated_activation_takes_the_gate_first(device, random_normal, dtype, num_tokens, features, name):
    x = random_normal(dtype, num_tokens, 2 * features, scale=2.0)
    out = device.poisoned((num_tokens, features), dtype)
    gated_activation(device.library, device.put(x), out, name)
    gate, up = x[:, :features].astype(np.float64), x[:, features:].astype(np.float64)
    assert_close(device.get(out), reference(name, gate) * up)


def test_more_rows_than_other_extents_of_a_grid_have_blocks(device, random_normal):
    """Of which only the first goes beyond 65,535."""
    x = random_normal(DTYPES["float32"], 65_537, 16)
    plain, gated = device.put(x), device.poisoned((65_537, 8), x.dtype)
    gated_activation(device.library, plain, gated, "relu")
    activation(device.library, plain, plain, "relu")
    np.testing.assert_array_equal(device.get(gated), np.maximum(x[:, :8], 0) * x[:, 8:])
    np.testing.assert_array_equal(device.get(plain), np.maximum(x, 0))


@pytest.mark.parametrize("name", ["gelu_tanh", "relu"])
@pytest.mark.parametrize(("dtype", "num_tokens", "features"), SIZES)
def test_plain_activation_may_work_in_place(device, random_normal, dtype, num_tokens, features, name):
    x = random_normal(dtype, num_tokens, features, scale=2.0)
    on_device = device.put(x)
    activation(device.library, on_device, on_device, name)
    assert_close(device.get(on_device), reference(name, x.astype(np.float64)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_float64(device, name):
    x = np.linspace(-9, 9, 4001, dtype=np.float32).reshape(1, -1)
    on_device = device.put(x)
    activation(device.library, on_device, on_device, name)
    assert_close(device.get(on_device), reference(name, x.astype(np.float64)))


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS} - {"relu2"}))
def test_activation_stays_finite_far_out(device, name):
    x = np.array([[-3e4, -100.0, -20.0, 20.0, 100.0, 3e4, 0.0, -0.0]], np.float32)
    on_device = device.put(x)
    activation(device.library, on_device, on_device, name)
    np.testing.assert_allclose(device.get(on_device), np.maximum(x, 0.0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_silu_keeps_its_limits(device, dtype):
    x = np.array([[np.inf, np.nan, 1e30, -1e30, -60.0, 0.0, -0.0, 3e38]], np.float32).astype(DTYPES[dtype])
    on_device = device.put(x)
    activation(device.library, on_device, on_device, "silu")
    limits = np.array([[np.inf, np.nan, 1e30, -0.0, -60.0 * np.exp(-60.0), 0.0, -0.0, 3e38]]).astype(DTYPES[dtype])
    np.testing.assert_allclose(
        device.get(on_device).astype(np.float64), limits.astype(np.float64), rtol=2e-5 if dtype == "float32" else 2**-7
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sigmoid_of_a_large_input_is_exactly_one(device, dtype):
    x = np.array([[17.5, 40.0, 100.0, 3e4, 1.25e20, 2.0**100, 88.0, 120.0]], np.float32).astype(DTYPES[dtype])
    on_device = device.put(x)
    activation(device.library, on_device, on_device, "silu")
    np.testing.assert_array_equal(device.get(on_device), x)


def test_unknown_activation_is_refused(device):
    x = device.put(np.zeros((1, 8), np.float32))
    with pytest.raises(ExecutorError, match="'swish' is not one of silu"):
        activation(device.library, x, x, "swish")
