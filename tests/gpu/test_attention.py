"""Paged attention on the GPU against float64 NumPy: shapes, lengths, variants, capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from phalanx.kernels.attention import AttentionLimits, AttentionShape  # noqa: E402
from phalanx.kernels.library import KernelLibrary, Library  # noqa: E402
from tests.gpu.attention_case import TOLERANCE, Case, DeviceCase  # noqa: E402

pytestmark = pytest.mark.gpu

# New tokens and whole lengths: one token, block boundaries and their neighbours, primes; then whole prompts, chunks with
# history and a prefix hit.
DECODE = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 257, 521, 1024)
PREFILL = (
    (2, 2),
    (5, 5),
    (16, 16),
    (17, 64),
    (64, 64),
    (61, 131),
    (3, 300),
    (128, 128),
    (130, 257),
    (211, 211),
)


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary()


class PortableLibrary:
    """The same device, taken for an Ampere GPU: other tile sizes, no Hopper instructions."""

    architecture = "sm_80"

    def __init__(self, library: KernelLibrary) -> None:
        self.function = library.function
        self.num_multiprocessors = library.num_multiprocessors


def shape_of(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int = 16, **changes: Any) -> AttentionShape:
    values = {"dtype": "bfloat16", "scale": head_dim**-0.5, **changes}
    return AttentionShape(num_heads, num_kv_heads, head_dim, block_size, **values)


def mixed(shape: AttentionShape, *, seed: int = 0, has_alibi: bool = False) -> Case:
    new_tokens = (*(1 for _ in DECODE), *(new for new, _ in PREFILL))
    seq_lens = (*DECODE, *(total for _, total in PREFILL))
    return Case(shape, new_tokens, seq_lens, has_alibi=has_alibi, seed=seed)


def check(case: Case, library: Library) -> None:
    case.poison_unwritten()
    device = DeviceCase(case, library)
    device.poison()
    device.launch()
    error = device.largest_error()
    assert error < TOLERANCE[case.shape.dtype], f"error {error:.2e} of sum(p |v|)"


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 72, 80, 96, 112, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_head_dim(library: KernelLibrary, head_dim: int, dtype: str) -> None:
    check(mixed(shape_of(8, 2, head_dim, dtype=dtype)), library)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (8, 1), (5, 1), (14, 2), (16, 2), (16, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups(library: KernelLibrary, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    check(mixed(shape_of(num_heads, num_kv_heads, head_dim)), library)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(71, 64), (48, 128), (128, 128), (33, 256)])
def test_many_heads_share_one_key_head(library: KernelLibrary, num_heads: int, head_dim: int) -> None:
    check(mixed(shape_of(num_heads, 1, head_dim)), library)


@pytest.mark.parametrize("features", [{}, {"window": 50}, {"soft_cap": 3.0}, {"causal": False}])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_portable_kernels(library: KernelLibrary, head_dim: int, features: dict[str, Any]) -> None:
    case = mixed(shape_of(8, 2, head_dim, 32, **features), has_alibi="window" in features)
    check(case, PortableLibrary(library))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_block_sizes(library: KernelLibrary, block_size: int, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, block_size)), library)


@pytest.mark.parametrize("window", [1, 7, 64, 100, 4096])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_sliding_window(library: KernelLibrary, window: int, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, window=window)), library)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_alibi(library: KernelLibrary, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim), has_alibi=True), library)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_soft_cap(library: KernelLibrary, dtype: str) -> None:
    check(mixed(shape_of(8, 2, 128, soft_cap=2.0, scale=0.3, dtype=dtype)), library)


def test_window_cap_and_alibi_together(library: KernelLibrary) -> None:
    check(mixed(shape_of(14, 2, 80, 32, window=77, soft_cap=5.0), has_alibi=True), library)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_without_causal_mask_a_token_sees_its_whole_sequence(library: KernelLibrary, head_dim: int) -> None:
    check(mixed(shape_of(8, 2, head_dim, causal=False)), library)


@pytest.mark.parametrize("head_dim", [8, 40, 128, 256])
@pytest.mark.parametrize("features", [{}, {"window": 50}, {"soft_cap": 3.0}, {"causal": False}])
def test_float32(library: KernelLibrary, head_dim: int, features: dict[str, Any]) -> None:
    check(mixed(shape_of(6, 2, head_dim, dtype="float32", **features), has_alibi="window" in features), library)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 1, 256), (8, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("seq_len", [4097, 40_000])
def test_one_long_sequence_is_split_and_merged(
    library: KernelLibrary, num_heads: int, num_kv_heads: int, head_dim: int, seq_len: int
) -> None:
    check(Case(shape_of(num_heads, num_kv_heads, head_dim), (1,), (seq_len,)), library)


def test_many_sequences_of_uneven_length(library: KernelLibrary) -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(3).integers(1, 900, 300))
    check(Case(shape_of(8, 2, 64), (1,) * 300, lengths), library)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 1, 64), (4, 1, 128), (4, 2, 256)])
def test_long_prefill_with_history(library: KernelLibrary, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    lengths = ((1500, 1500), (700, 3000), (33, 2049), (257, 257), (1024, 1024))
    shape = shape_of(num_heads, num_kv_heads, head_dim)
    check(Case(shape, tuple(new for new, _ in lengths), tuple(total for _, total in lengths)), library)


def test_large_scores_do_not_overflow(library: KernelLibrary) -> None:
    check(mixed(shape_of(8, 2, 128, scale=8.0)), library)


@pytest.mark.parametrize(
    ("new_tokens", "seq_lens"),
    [((1, 1), (5, 70)), ((9, 130), (9, 200)), ((), ())],
    ids=["decode only", "prefill only", "empty"],
)
def test_a_step_may_lack_either_kind(
    library: KernelLibrary, new_tokens: tuple[int, ...], seq_lens: tuple[int, ...]
) -> None:
    case = Case(shape_of(8, 2, 64), new_tokens or (1,), seq_lens or (1,))
    if new_tokens:
        check(case, library)
        return
    case.data["counts"][:] = 0
    device = DeviceCase(case, library)
    device.poison()
    device.launch()
    assert np.isnan(device.result().astype(np.float32)).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_repeated_runs_are_bitwise_equal(library: KernelLibrary, head_dim: int) -> None:
    new_tokens = (*(1 for _ in range(40)), 50, 128, 700)
    seq_lens = (9000, *(37 * i + 1 for i in range(39)), 700, 128, 1900)
    device = DeviceCase(Case(shape_of(16, 4, head_dim), new_tokens, seq_lens), library)
    results = []
    for _ in range(30):
        device.poison()
        device.launch()
        results.append(device.result().tobytes())
    assert len(set(results)) == 1


def test_captured_graph_follows_lengths_that_change_on_the_device(library: KernelLibrary) -> None:
    shape = shape_of(8, 2, 128)
    first = Case(shape, (1, 1, 1, 40, 90), (70, 5, 900, 40, 300), seed=1)
    second = Case(shape, (1, 1, 30, 2, 80), (400, 1, 35, 80, 100), seed=2)
    limits = AttentionLimits(16, 256, 1024)
    device, other = DeviceCase(first, library, limits), DeviceCase(second, library, limits)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        device.launch()
        graph = stream.end_capture()
    for source in (device, other):
        eager = DeviceCase(source.case, library, limits)
        eager.poison()
        eager.launch()
        cupy.cuda.Device().synchronize()
        device.fill_from(source)
        device.poison()
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        rows = sum(source.case.new_tokens)
        assert device.result()[:rows].tobytes() == eager.result()[:rows].tobytes()
