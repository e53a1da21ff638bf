import numpy as np
import pytest

from phalanx.kernels.head_norm import head_norm
from phalanx.kernels.soft_cap import soft_cap

from .devices import cases
from .tolerance import assert_close


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    cases((1, 4, 4, 64), (5, 6, 2, 128), (3, 5, 1, 40)),
)
def test_query_and_key_heads_are_normed_and_values_left(
    device, random_normal, dtype, num_tokens, num_heads, num_kv_heads, head_dim, weight_offset
):
    qkv = random_normal(dtype, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, scale=3.0)
    query_weight, key_weight = (random_normal(dtype, head_dim) for _ in range(2))
    out = device.put(qkv)
    head_norm(
        device.library, out, device.put(query_weight), device.put(key_weight), num_heads=num_heads,
        num_kv_heads=num_kv_heads, epsilon=1e-5, weight_offset=weight_offset,
    )  # fmt: skip
    wide = qkv.astype(np.float64).reshape(num_tokens, -1, head_dim)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected = wide.copy()
    ends = (num_heads, num_heads + num_kv_heads)
    expected[:, : ends[0]] = normed[:, : ends[0]] * (weight_offset + query_weight.astype(np.float64))
    expected[:, ends[0] : ends[1]] = normed[:, ends[0] : ends[1]] * (weight_offset + key_weight.astype(np.float64))
    assert_close(device.get(out), expected.reshape(qkv.shape))


@pytest.mark.parametrize(("dtype", "num_rows", "width"), cases((1, 64), (3, 101), (2, 2048)))
def test_soft_cap_equals_float64(device, random_normal, dtype, num_rows, width):
    x = random_normal(dtype, num_rows, width, scale=40.0)
    out = device.put(x)
    soft_cap(device.library, out, 30.0)
    assert_close(device.get(out), 30.0 * np.tanh(x.astype(np.float64) / 30.0))
