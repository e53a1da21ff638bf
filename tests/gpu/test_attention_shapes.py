"""Paged attention on the GPU against float64 NumPy: every head dim, group, block size and variant; capture and repetition.

tests/kernels/test_attention.py is the smaller set that also runs on the emulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.kernels.attention_shape import AttentionLimits, AttentionShape
from phalanx.kernels.library import KernelLibrary
from tests.kernels.attention_case import Case, DeviceCase, check, shape_of
from tests.kernels.devices import CudaDevice, KernelDevice, has_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

# New tokens and whole lengths: one token, block boundaries and their neighbours, primes; then whole prompts, chunks with
# history and a prefix hit.
DECODE = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 257, 521, 1024)
PREFILL = ((2, 2), (5, 5), (16, 16), (17, 64), (64, 64), (61, 131), (3, 300), (128, 128), (130, 257), (211, 211))


class AmpereLibrary:
    """The device's own library under an older GPU's name: other tile sizes, no Hopper instructions."""

    architecture = "sm_80"

    def __init__(self, library: KernelLibrary) -> None:
        self.function = library.function
        self.num_multiprocessors = library.num_multiprocessors


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def portable_device() -> CudaDevice:
    device = CudaDevice()
    device.library = AmpereLibrary(device.library)
    return device


def mixed(shape: AttentionShape, *, seed: int = 0, has_alibi: bool = False) -> Case:
    new_tokens = (*(1 for _ in DECODE), *(new for new, _ in PREFILL))
    seq_lens = (*DECODE, *(total for _, total in PREFILL))
    return Case(shape, new_tokens, seq_lens, has_alibi=has_alibi, seed=seed)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 72, 80, 96, 112, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_head_dim(device: KernelDevice, head_dim: int, dtype: str) -> None:
    check(mixed(shape_of(8, 2, head_dim, dtype=dtype)), device)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (8, 1), (5, 1), (14, 2), (16, 2), (16, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups(device: KernelDevice, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    check(mixed(shape_of(num_heads, num_kv_heads, head_dim)), device)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(71, 64), (48, 128), (128, 128), (33, 256)])
def test_many_heads_share_one_key_head(device: KernelDevice, num_heads: int, head_dim: int) -> None:
    check(mixed(shape_of(num_heads, 1, head_dim)), device)


@pytest.mark.parametrize("features", [{}, {"window": 50}, {"soft_cap": 3.0}, {"causal": False}, {"has_prefix": True}])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_portable_kernels(portable_device: KernelDevice, head_dim: int, features: dict[str, Any]) -> None:
    case = mixed(shape_of(8, 2, head_dim, 32, **features), has_alibi="window" in features)
    check(case, portable_device)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_block_sizes(device: KernelDevice, block_size: int, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, block_size)), device)


@pytest.mark.parametrize("window", [1, 7, 64, 100, 4096])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_sliding_window(device: KernelDevice, window: int, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, window=window)), device)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_alibi(device: KernelDevice, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim), has_alibi=True), device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_soft_cap(device: KernelDevice, dtype: str) -> None:
    check(mixed(shape_of(8, 2, 128, soft_cap=2.0, scale=0.3, dtype=dtype)), device)


def test_window_cap_and_alibi_together(device: KernelDevice) -> None:
    check(mixed(shape_of(14, 2, 80, 32, window=77, soft_cap=5.0), has_alibi=True), device)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_without_causal_mask_a_token_sees_its_whole_sequence(device: KernelDevice, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, causal=False)), device)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("has_fp8_pages", [False, True])
def test_a_prefix_is_seen_by_all_of_its_sequence(device: KernelDevice, head_dim: int, has_fp8_pages: bool) -> None:
    check(mixed(shape_of(8, 2, head_dim, has_prefix=True, has_fp8_pages=has_fp8_pages)), device)


@pytest.mark.parametrize("head_dim", [8, 40, 128, 256])
@pytest.mark.parametrize("features", [{}, {"window": 50}, {"soft_cap": 3.0}, {"causal": False}, {"has_prefix": True}])
def test_float32(device: KernelDevice, head_dim: int, features: dict[str, Any]) -> None:
    check(mixed(shape_of(6, 2, head_dim, dtype="float32", **features), has_alibi="window" in features), device)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 1, 256), (8, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("seq_len", [4097, 40_000])
def test_one_long_sequence_is_split_and_merged(
    device: KernelDevice, num_heads: int, num_kv_heads: int, head_dim: int, seq_len: int
) -> None:
    check(Case(shape_of(num_heads, num_kv_heads, head_dim), (1,), (seq_len,)), device)


def test_many_sequences_of_uneven_length(device: KernelDevice) -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(3).integers(1, 900, 300))
    check(Case(shape_of(8, 2, 64), (1,) * 300, lengths), device)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 1, 64), (4, 1, 128), (4, 2, 256)])
@pytest.mark.parametrize("has_fp8_pages", [False, True])
def test_long_prefill_with_history(
    device: KernelDevice, num_heads: int, num_kv_heads: int, head_dim: int, has_fp8_pages: bool
) -> None:
    lengths = ((1500, 1500), (700, 3000), (33, 2049), (257, 257), (1024, 1024))
    shape = shape_of(num_heads, num_kv_heads, head_dim, has_fp8_pages=has_fp8_pages)
    check(Case(shape, tuple(new for new, _ in lengths), tuple(total for _, total in lengths)), device)


def test_large_scores_do_not_overflow(device: KernelDevice) -> None:
    check(mixed(shape_of(8, 2, 128, scale=8.0)), device)


@pytest.mark.parametrize(
    ("new_tokens", "seq_lens"), [((1, 1), (5, 70)), ((9, 130), (9, 200))], ids=["decode", "prefill"]
)
def test_a_step_may_lack_either_kind(
    device: KernelDevice, new_tokens: tuple[int, ...], seq_lens: tuple[int, ...]
) -> None:
    check(Case(shape_of(8, 2, 64), new_tokens, seq_lens), device)


def test_an_empty_step_writes_nothing(device: KernelDevice) -> None:
    case = Case(shape_of(8, 2, 64), (1,), (1,))
    case.data["num_seqs_and_decodes"][:] = 0
    run = DeviceCase(case, device)
    run.launch()
    assert np.isnan(run.result().astype(np.float32)).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("has_fp8_pages", [False, True])
def test_repeated_runs_are_bitwise_equal(device: KernelDevice, head_dim: int, has_fp8_pages: bool) -> None:
    new_tokens = (*(1 for _ in range(40)), 50, 128, 700)
    seq_lens = (9000, *(37 * i + 1 for i in range(39)), 700, 128, 1900)
    run = DeviceCase(Case(shape_of(16, 4, head_dim, has_fp8_pages=has_fp8_pages), new_tokens, seq_lens), device)
    results = []
    for _ in range(30):
        run.poison()
        run.launch()
        results.append(run.result().tobytes())
    assert len(set(results)) == 1


def test_captured_graph_follows_lengths_that_change_on_the_device(device: KernelDevice) -> None:
    shape = shape_of(8, 2, 128)
    first = Case(shape, (1, 1, 1, 40, 90), (70, 5, 900, 40, 300), seed=1)
    second = Case(shape, (1, 1, 30, 2, 80), (400, 1, 35, 80, 100), seed=2)
    limits = AttentionLimits(16, 256, 1024)
    captured, other = DeviceCase(first, device, limits), DeviceCase(second, device, limits)
    graph = _captured(captured)
    for source in (captured, other):
        eager = DeviceCase(source.case, device, limits)
        eager.launch()
        captured.fill_from(source)
        captured.poison()
        _wait()
        graph.launch()
        rows = sum(source.case.new_tokens)
        assert captured.result()[:rows].tobytes() == eager.result()[:rows].tobytes()


def _captured(run: DeviceCase) -> Any:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        run.launch()
        return stream.end_capture()


def _wait() -> None:
    import cupy

    cupy.cuda.Device().synchronize()
