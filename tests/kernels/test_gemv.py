import numpy as np
import pytest

from phalanx.kernels.gemv import GEMV_SHAPES, GemvShape, gated_gemv, gemv
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES
from .test_activation import reference
from .tolerance import assert_close

HALVES = [DTYPES["bfloat16"], DTYPES["float16"]]


def product_limit(x, weight):
    """The largest sum of absolute products: what float32 accumulation is exact against."""
    return (np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T).max()


@pytest.mark.parametrize(
    ("num_tokens", "shape"), [*((3, shape) for shape in GEMV_SHAPES), *((n, GemvShape(8, 2, 2)) for n in (1, 8, 13, 16))],
    ids=str,
)  # fmt: skip
def test_gemv_equals_float64_for_every_shape_of_block(device, random_normal, num_tokens, shape):
    dtype = DTYPES["bfloat16"]
    x, weight = random_normal(dtype, num_tokens, 160), random_normal(dtype, 45, 160)
    out = device.poisoned((num_tokens, 45), dtype)
    gemv(device.library, device.put(x), device.put(weight), out, shape=shape)
    assert_close(device.get(out), x.astype(np.float64) @ weight.astype(np.float64).T, product_limit(x, weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 32), (17, 1056), (64, 64)])
def test_gemv_adds_a_bias(device, random_normal, dtype, out_features, in_features):
    x, weight = random_normal(dtype, 2, in_features), random_normal(dtype, out_features, in_features)
    bias = random_normal(dtype, out_features)
    out = device.poisoned((2, out_features), dtype)
    gemv(device.library, device.put(x), device.put(weight), out, bias=device.put(bias))
    expected = x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)
    assert_close(device.get(out), expected, product_limit(x, weight))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_gated_gemv_equals_product_then_activation(device, random_normal, dtype, num_tokens, name):
    features, in_features = 20, 96
    x, weight = (
        random_normal(dtype, num_tokens, in_features),
        random_normal(dtype, 2 * features, in_features, scale=0.1),
    )
    out, both = device.poisoned((num_tokens, features), dtype), device.poisoned((num_tokens, 2 * features), dtype)
    gated_gemv(device.library, device.put(x), device.put(weight), out, name, shape=GemvShape(4))
    gemv(device.library, device.put(x), device.put(weight), both, shape=GemvShape(4))
    gate, up = np.split(device.get(both).astype(np.float64), 2, axis=1)
    assert_close(device.get(out), reference(name, gate) * up)


def test_what_gemv_does_not_take_is_refused(device):
    for x in (np.zeros((17, 32), np.float16), np.zeros((1, 40), np.float16), np.zeros((1, 32), np.float32)):
        weight, out = np.zeros((8, x.shape[1]), x.dtype), np.zeros((len(x), 8), x.dtype)
        with pytest.raises(ExecutorError, match=r"gemv takes at most 16 tokens"):
            gemv(device.library, device.put(x), device.put(weight), device.put(out))
