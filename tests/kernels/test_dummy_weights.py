import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.dummy import DummySource
from phalanx.checkpoints.spec import DummyRange, Part, WeightSpec
from phalanx.kernels.add import add
from phalanx.kernels.dummy_weights import dummy_weights

from .devices import cases
from .tolerance import assert_close


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "F8_E4M3"])
def test_device_makes_the_same_dummy_weights_as_the_host(device, stored, transposed):
    source = DummySource(7, stored, {"layer.weight": (50, 23)})
    dummy = source.slice("layer.weight", (slice(11, 31), slice(3, 20)), transposed)
    expected = dummy.values().astype(np.float32)
    whole = device.poisoned((40, 40), np.float32)
    region = whole[5:22, 2:22] if transposed else whole[5:25, 2:19]
    dummy_weights(
        device.library, region, stored_dtype=stored, stored_columns=23, origin=(11, 3), transposed=transposed,
        keys=(dummy.key0, dummy.key1), mean=dummy.mean, width=dummy.width,
    )  # fmt: skip
    result = device.get(whole)
    rows, columns = (17, 20) if transposed else (20, 17)
    np.testing.assert_array_equal(result[5 : 5 + rows, 2 : 2 + columns], expected.T if transposed else expected)
    assert np.isnan(result).sum() == 40 * 40 - rows * columns


@pytest.mark.parametrize(("stored", "largest"), [("F8_E4M3", 448.0), ("I8", 127.9)])
def test_dummy_codes_are_stored_as_bytes(device, stored, largest):
    part = Part("layer.weight", (30, 64))
    spec = WeightSpec("layer.codes", (part,), dtype=stored, dummy=DummyRange(-largest, largest))
    dummy = DummySource(7, "F32").declared([spec]).slice("layer.weight", (slice(10, 30), slice(0, 64)))
    expected = dummy.values()
    out = device.poisoned(expected.shape, np.int8 if stored == "I8" else np.uint8)
    dummy_weights(
        device.library, out, stored_dtype=stored, stored_columns=64, origin=(10, 0), transposed=False,
        keys=(dummy.key0, dummy.key1), mean=dummy.mean, width=dummy.width,
    )  # fmt: skip
    np.testing.assert_array_equal(device.get(out).view(np.uint8), expected.view(np.uint8))
    assert np.abs(expected.astype(np.float32)).max() > 0.9 * largest


def test_dummy_vectors_are_rounded_to_the_compute_dtype(device):
    source = DummySource(1, "F32", {"norm.weight": (37,)})
    dummy = source.slice("norm.weight", (slice(4, 30),))
    out = device.poisoned((26,), ml_dtypes.bfloat16)
    dummy_weights(
        device.library, out, stored_dtype="F32", stored_columns=37, origin=(0, 4), transposed=False,
        keys=(dummy.key0, dummy.key1), mean=dummy.mean, width=dummy.width,
    )  # fmt: skip
    np.testing.assert_array_equal(device.get(out), dummy.values().astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("dtype", "rows", "columns"), cases((1, 64), (7, 33)))
def test_add(device, random_normal, dtype, rows, columns):
    x, y = random_normal(dtype, rows, columns), random_normal(dtype, rows, columns)
    out = device.poisoned((rows, columns), dtype)
    add(device.library, device.put(x), device.put(y), out)
    assert_close(device.get(out), x.astype(np.float64) + y.astype(np.float64))
