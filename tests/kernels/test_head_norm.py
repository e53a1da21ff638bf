import numpy as np
import pytest

from phalanx.kernels.head_norm import head_norm
from phalanx.kernels.scale_and_clip import scale_and_clip
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


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "num_heads", "num_kv_heads", "head_dim"), cases((1, 4, 4, 64), (3, 5, 1, 40))
)
def test_layer_norm_of_heads_with_their_own_weights(
    device, random_normal, dtype, num_tokens, num_heads, num_kv_heads, head_dim, is_flat, has_bias
):
    qkv = (random_normal(np.float64, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim) + 9.0).astype(dtype)
    weights, biases = ([random_normal(dtype, heads, head_dim) for heads in (num_heads, num_kv_heads)] for _ in "wb")
    out = device.put(qkv)
    given = [device.put(vector.reshape(-1) if is_flat else vector) for vector in (*weights, *biases)]
    query_bias, key_bias = given[2:] if has_bias else (None, None)
    head_norm(
        device.library, out, *given[:2], num_heads=num_heads, num_kv_heads=num_kv_heads, epsilon=1e-5, weight_offset=0.0,
        is_layer_norm=True, query_bias=query_bias, key_bias=key_bias,
    )  # fmt: skip
    expected = qkv.astype(np.float64).reshape(num_tokens, -1, head_dim)
    normed = expected[:, : num_heads + num_kv_heads]
    normed -= normed.mean(-1, keepdims=True)
    normed *= np.concatenate(weights).astype(np.float64) / np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-5)
    normed += np.concatenate(biases).astype(np.float64) * has_bias
    assert_close(device.get(out), expected.reshape(qkv.shape))


@pytest.mark.parametrize(("dtype", "num_rows", "width"), cases((1, 64), (3, 101), (2, 2048)))
def test_soft_cap_equals_float64(device, random_normal, dtype, num_rows, width):
    x = random_normal(dtype, num_rows, width, scale=40.0)
    out = device.put(x)
    soft_cap(device.library, out, 30.0)
    assert_close(device.get(out), 30.0 * np.tanh(x.astype(np.float64) / 30.0))


@pytest.mark.parametrize(("dtype", "num_rows", "width"), cases((1, 64), (3, 101)))
def test_scaling_and_clipping_equal_float64_and_keep_what_is_not_a_number(
    device, random_normal, dtype, num_rows, width
):
    x = random_normal(dtype, num_rows, width, scale=4.0)
    x[0, 3] = np.nan
    out, scaled = device.put(x), device.put(x)
    scale_and_clip(device.library, out, factor=0.75, limit=2.0)
    scale_and_clip(device.library, scaled, factor=-3.0)
    finite = ~np.isnan(x.astype(np.float64))
    assert_close(device.get(out)[finite], np.clip(0.75 * x.astype(np.float64), -2.0, 2.0)[finite])
    assert_close(device.get(scaled)[finite], -3.0 * x.astype(np.float64)[finite])
    assert np.isnan(device.get(out).astype(np.float64)[0, 3])
