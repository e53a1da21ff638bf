import numpy as np
import pytest

from phalanx.kernels.embedding import add_position_embedding, embedding
from phalanx.kernels.rows import add_bias, gather_rows
from phalanx.parallel.errors import ExecutorError

from .devices import cases
from .tolerance import assert_close

SIZES = cases((1, 64), (7, 96), (5, 33), (3, 2050))


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_embedding_scales_local_rows_and_zeroes_the_others(device, random_normal, dtype, num_tokens, hidden_size):
    table = random_normal(dtype, 11, hidden_size)
    token_ids = np.resize(np.array([20, 30, 19, 31, 25, 0, 2**31 - 1], np.int32), num_tokens)
    out = device.poisoned((num_tokens, hidden_size), dtype)
    embedding(device.library, device.put(token_ids), device.put(table), out, vocab_start=20, scale=45.25)
    local = (token_ids >= 20) & (token_ids < 31)
    expected = np.where(local[:, None], 45.25 * table.astype(np.float64)[np.clip(token_ids - 20, 0, 10)], 0.0)
    assert_close(device.get(out), expected)
    assert np.all(device.get(out)[~local] == 0)


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_position_embedding_is_added_in_place(device, random_normal, dtype, num_tokens, hidden_size):
    x, table = random_normal(dtype, num_tokens, hidden_size), random_normal(dtype, 9, hidden_size)
    positions = (np.arange(num_tokens, dtype=np.int32) * 5 + 8) % 9
    on_device = device.put(x)
    add_position_embedding(device.library, on_device, device.put(positions.astype(np.int32)), device.put(table))
    assert_close(device.get(on_device), x.astype(np.float64) + table.astype(np.float64)[positions])


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_gathered_rows_are_copies_and_padding_is_zero(device, random_normal, dtype, num_tokens, hidden_size):
    x = random_normal(dtype, num_tokens, hidden_size)
    rows = np.array([num_tokens - 1, -1, 0], np.int32)
    out = device.poisoned((3, hidden_size), dtype)
    gather_rows(device.library, device.put(x), device.put(rows), out)
    result = device.get(out)
    np.testing.assert_array_equal(result[[0, 2]], x[[num_tokens - 1, 0]])
    assert np.all(result[1] == 0)


@pytest.mark.parametrize(("dtype", "num_tokens", "hidden_size"), SIZES)
def test_bias_is_added_in_place(device, random_normal, dtype, num_tokens, hidden_size):
    x, bias = random_normal(dtype, num_tokens, hidden_size), random_normal(dtype, hidden_size)
    on_device = device.put(x)
    add_bias(device.library, on_device, device.put(bias))
    assert_close(device.get(on_device), x.astype(np.float64) + bias.astype(np.float64))


def test_wrong_shape_or_dtype_is_refused_with_both_named(device, random_normal):
    x = device.put(random_normal(np.float32, 4, 8))
    with pytest.raises(ExecutorError, match=r"bias is .*float32\[7\].*float32\[8\]"):
        add_bias(device.library, x, device.put(random_normal(np.float32, 7)))
    with pytest.raises(ExecutorError, match=r"bias is .*float16\[8\].*float32\[8\]"):
        add_bias(device.library, x, device.put(random_normal(np.float16, 8)))
    with pytest.raises(ExecutorError, match="float64 is not one of"):
        add_bias(device.library, device.put(np.zeros((4, 8))), device.put(np.zeros(8)))
    with pytest.raises(ExecutorError, match="strided"):
        add_bias(
            device.library,
            device.put(random_normal(np.float32, 4, 16))[:, ::2],
            device.put(np.zeros(8, np.float32)),
        )
