import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import to_codes
from phalanx.kernels.rotary import Fp8Pages, RotaryTables, rotary_kv_write
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, cases, poison
from .tolerance import assert_close

NUM_BLOCKS, BLOCK_SIZE, MAX_POSITIONS = 5, 16, 300
LAYOUTS = cases((4, 2, 64, 64), (8, 1, 256, 256), (3, 3, 128, 128), (2, 1, 80, 32), (2, 2, 24, 8), (1, 1, 7, 6))


def tables(rotary_dim, base=10000.0):
    inverse = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(MAX_POSITIONS)[:, None] * inverse
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x, cos, sin, interleaved):
    """x [T, heads, C] float64; the first 2 * cos.shape[1] channels rotate."""
    half = cos.shape[1]
    cos, sin = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
    index = np.arange(half)
    first, second = (2 * index, 2 * index + 1) if interleaved else (index, half + index)
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result


def run(device, qkv, num_heads, num_kv_heads, head_dim, rotary, slots, positions, dtype, **options):
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    on_device, keys, values = device.put(qkv), device.poisoned(shape, dtype), device.poisoned(shape, dtype)
    rotary_kv_write(
        device.library, on_device, device.put(positions), device.put(slots), keys, values, rotary,
        num_heads=num_heads, **options,
    )  # fmt: skip
    return device.get(on_device), device.get(keys), device.get(values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"), LAYOUTS)
def test_rotated_keys_and_plain_values_land_in_their_slots(
    device, random_normal, dtype, num_heads, num_kv_heads, head_dim, rotary_dim, interleaved
):
    slots = np.array([17, 0, -1, 79, 16, 33, 1], np.int32)
    positions = np.array([0, 1, 0, 299, 5, 64, 128], np.int32)
    qkv = random_normal(dtype, len(slots), (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin = tables(rotary_dim)
    rotary = RotaryTables(device.put(cos), device.put(sin), interleaved)
    result, keys, values = run(
        device,
        qkv,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary,
        slots,
        positions,
        dtype,
    )
    heads = qkv.astype(np.float64).reshape(len(slots), -1, head_dim)
    turned = rotated(heads[:, : num_heads + num_kv_heads], cos[positions], sin[positions], interleaved)
    written = slots >= 0
    after = result.reshape(heads.shape)
    assert_close(after[written, :num_heads], turned[written, :num_heads])
    np.testing.assert_array_equal(after[~written], qkv.reshape(heads.shape)[~written])
    end = num_heads + num_kv_heads
    np.testing.assert_array_equal(after[:, num_heads:end], qkv.reshape(heads.shape)[:, num_heads:end])
    block, offset = slots[written] // BLOCK_SIZE, slots[written] % BLOCK_SIZE
    assert_close(keys[block, :, offset], turned[written, num_heads:])
    np.testing.assert_array_equal(values[block, :, offset], qkv.reshape(heads.shape)[written, end:])
    untouched = np.ones((NUM_BLOCKS, BLOCK_SIZE), bool)
    untouched[block, offset] = False
    for pages in (keys, values):
        rest = pages.swapaxes(1, 2)[untouched]
        assert rest.tobytes() == poison(rest.shape, dtype).tobytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"), cases((4, 2, 64, 32), (3, 3, 40, 16))
)
def test_two_parts_of_a_head_turn_by_the_position_in_the_prefix_and_by_that_after_it(
    device, random_normal, dtype, num_heads, num_kv_heads, head_dim, rotary_dim, interleaved
):
    slots, positions = np.array([17, 0, 79, 16, 33], np.int32), np.array([0, 4, 5, 6, 299], np.int32)
    prefix_lens = np.array([0, 6, 6, 6, 1], np.int32)
    in_prefix, after = np.array([0, 4, 5, 5, 0]), np.array([0, 0, 0, 1, 299])
    qkv = random_normal(dtype, len(slots), (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin = tables(rotary_dim)
    rotary = RotaryTables(device.put(cos), device.put(sin), interleaved, is_two_dimensional=True)
    result, keys, _ = run(
        device, qkv, num_heads, num_kv_heads, head_dim, rotary, slots, positions, dtype, prefix_lens=device.put(prefix_lens)
    )  # fmt: skip
    turned = qkv.astype(np.float64).reshape(len(slots), -1, head_dim)
    for first, where in ((0, in_prefix), (rotary_dim, after)):
        turned[..., first:] = rotated(turned[..., first:], cos[where], sin[where], interleaved)
    assert_close(result.reshape(turned.shape)[:, :num_heads], turned[:, :num_heads])
    assert_close(keys[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE], turned[:, num_heads : num_heads + num_kv_heads])


def test_two_dimensions_need_the_lengths_of_prefixes(device):
    cos, sin = (device.put(table) for table in tables(8))
    rotary = RotaryTables(cos, sin, is_two_dimensional=True)
    with pytest.raises(ExecutorError, match="pass prefix_lens"):
        run(
            device, np.zeros((1, 48), np.float32), 1, 1, 16, rotary, np.zeros(1, np.int32), np.zeros(1, np.int32), np.float32
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_without_rotary_only_the_pages_change(device, random_normal, dtype):
    slots = np.array([3, 40], np.int32)
    qkv = random_normal(dtype, 2, 3 * 2 * 32)
    result, keys, values = run(device, qkv, 2, 2, 32, None, slots, np.zeros(2, np.int32), dtype)
    np.testing.assert_array_equal(result, qkv)
    heads = qkv.reshape(2, 6, 32)
    np.testing.assert_array_equal(keys[slots // 16, :, slots % 16], heads[:, 2:4])
    np.testing.assert_array_equal(values[slots // 16, :, slots % 16], heads[:, 4:])


@pytest.mark.parametrize("rotary_dim", [0, 32, 80])
def test_pages_of_codes_hold_what_16_bit_pages_would_divided_by_the_scale(device, random_normal, rotary_dim):
    dtype, heads, kv_heads, head_dim = DTYPES["bfloat16"], 3, 2, 80
    slots, positions = np.array([17, -1, 0, 79], np.int32), np.array([0, 3, 299, 5], np.int32)
    qkv = random_normal(dtype, 4, (heads + 2 * kv_heads) * head_dim, scale=9.0)
    rotary = RotaryTables(*map(device.put, tables(rotary_dim))) if rotary_dim else None
    plain, *dense = run(device, qkv, heads, kv_heads, head_dim, rotary, slots, positions, dtype)
    scales = np.array([[0.02, 1.0], [0.01, 3.0]], np.float32)
    saturated = device.put(np.zeros(1, np.int32))
    fp8 = Fp8Pages(device.put(scales), saturated)
    rotated_queries, *coded = run(device, qkv, heads, kv_heads, head_dim, rotary, slots, positions, np.uint8, fp8=fp8)
    np.testing.assert_array_equal(rotated_queries, plain)
    beyond = 0
    for pages, codes, scale in zip(dense, coded, scales, strict=True):
        inverse = (np.float32(1) / scale)[:, None]
        written = pages.astype(np.float32)[slots[slots >= 0] // 16, :, slots[slots >= 0] % 16]
        expected = to_codes(written, inverse, "fp8").view(np.uint8)
        np.testing.assert_array_equal(codes[slots[slots >= 0] // 16, :, slots[slots >= 0] % 16], expected)
        beyond += int((np.abs(written * inverse) > 448).sum())
    assert device.get(saturated)[0] == beyond > 0


def test_rotating_more_channels_than_a_head_has_is_refused(device):
    cos, sin = (device.put(table) for table in tables(32))
    with pytest.raises(ExecutorError, match=r"rotary_dim=32 of 1 part\(s\) is above head_dim=16"):
        run(
            device, np.zeros((1, 48), np.float32), 1, 1, 16, RotaryTables(cos, sin), np.zeros(1, np.int32),
            np.zeros(1, np.int32), np.float32,
        )  # fmt: skip
