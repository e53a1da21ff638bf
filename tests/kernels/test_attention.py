"""Paged attention against float64 NumPy on small steps; tests/gpu/test_attention_shapes.py has the long list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.attention import PagedAttention, attention_kernel_specs
from phalanx.kernels.attention_shape import AttentionLimits, AttentionShape
from phalanx.kernels.attention_tiling import DecodeTiling, PrefillTiling, shared_bytes_per_multiprocessor
from phalanx.kernels.compiler import compile_cubin, load_source
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ConfigError, ExecutorError
from tests.support.sass import assert_weights_alone_are_read_early

from .attention_case import Case, DeviceCase, check, shape_of
from .devices import KernelDevice

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def small_mixed(shape: AttentionShape, *, has_alibi: bool = False) -> Case:
    """Block boundaries and their neighbours, one token, a chunk with history, a whole prompt."""
    return Case(shape, (1, 1, 1, 1, 1, 3, 21, 33), (1, 16, 33, 64, 150, 70, 21, 64), has_alibi=has_alibi)


@pytest.mark.parametrize(
    ("heads", "changes"),
    [
        ((4, 2, 32), {"dtype": "float16"}),
        ((5, 1, 24), {}),
        ((10, 1, 64), {"block_size": 64}),
        ((2, 2, 256), {"block_size": 32}),
        ((2, 1, 64), {"window": 20, "soft_cap": 3.0}),
        ((2, 1, 64), {"causal": False}),
        ((3, 1, 64), {"has_prefix": True}),
        ((4, 2, 40), {"has_prefix": True, "dtype": "float32"}),
        ((4, 2, 32), {"has_fp8_pages": True, "dtype": "float16"}),
        ((3, 1, 16), {"has_fp8_pages": True}),
        ((5, 1, 80), {"has_fp8_pages": True}),
        ((6, 2, 128), {"has_fp8_pages": True, "block_size": 64}),
        ((2, 2, 256), {"has_fp8_pages": True, "block_size": 32}),
        ((2, 1, 64), {"has_fp8_pages": True, "window": 20, "soft_cap": 3.0}),
        ((4, 2, 40), {"dtype": "float32"}),
        ((4, 2, 40), {"dtype": "float32", "window": 20, "soft_cap": 3.0}),
    ],
    ids=str,
)
def test_mixed_step(device: KernelDevice, heads: tuple[int, int, int], changes: dict[str, Any]) -> None:
    check(small_mixed(shape_of(*heads, **changes), has_alibi="window" in changes), device)


class WideDevice:
    """The same device, taken for one with 40 multiprocessors: enough workers for two levels of merging."""

    def __init__(self, device: KernelDevice) -> None:
        self.library = WideLibrary(device.library)
        self.put, self.get, self.poisoned = device.put, device.get, device.poisoned


class WideLibrary:
    num_multiprocessors = 40

    def __init__(self, library: Library) -> None:
        self.architecture, self.function = library.architecture, library.function


@pytest.mark.parametrize("seq_len", [500, 2100, 5000])
def test_one_long_sequence_is_split_over_workers_and_merged(device: KernelDevice, seq_len: int) -> None:
    check(Case(shape_of(4, 1, 64), (1,), (seq_len,)), WideDevice(device))


def test_a_head_group_too_large_for_one_pass_is_split(device: KernelDevice) -> None:
    check(Case(shape_of(30, 1, 16), (1, 1, 2), (5, 130, 40)), device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fewer_keys_than_rows(device: KernelDevice, dtype: str) -> None:
    """Attention to another sequence: the step's rows are not among the keys, which may be fewer."""
    check(Case(shape_of(2, 1, 64, causal=False, dtype=dtype), (1, 1, 5, 40, 330), (3, 40, 4, 7, 20)), device)


def test_an_empty_step_writes_nothing(device: KernelDevice) -> None:
    case = Case(shape_of(4, 2, 32), (1,), (1,))
    case.data["num_seqs_and_decodes"][:] = 0
    run = DeviceCase(case, device)
    run.launch()
    assert np.isnan(run.result().astype(np.float32)).all()


def test_split_results_do_not_depend_on_the_run(device: KernelDevice) -> None:
    run = DeviceCase(Case(shape_of(4, 1, 32), (1, 1), (900, 70)), device)
    run.launch()
    first = run.result()[:2].tobytes()
    run.poison()
    run.launch()
    assert run.result()[:2].tobytes() == first


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 8, 71, 128])
def test_tiles_fit_the_multiprocessor(architecture: str, head_dim: int, group: int) -> None:
    decode = DecodeTiling.choose(head_dim, group, architecture)
    prefill = PrefillTiling.choose(head_dim, architecture)
    limit = shared_bytes_per_multiprocessor(architecture)
    assert decode.ring >= 2, "keys and values of one tile"
    assert decode.blocks_per_multiprocessor * (decode.shared_bytes + 1024) <= limit
    assert prefill.shared_bytes + 1024 <= limit
    assert decode.heads_per_item * decode.head_tiles >= group > decode.heads_per_item * (decode.head_tiles - 1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_hoppers_prefill_has_slots_for_keys_and_values_and_the_next_keys(head_dim: int) -> None:
    tiling = PrefillTiling.choose(head_dim, "sm_90a")
    assert tiling.defines["RING"] >= 3
    assert tiling.shared_bytes + 1024 <= shared_bytes_per_multiprocessor("sm_90a")


def test_hopper_gets_its_own_prefill_kernel_where_it_has_one() -> None:
    sources = {
        (architecture, head_dim): PrefillTiling.choose(head_dim, architecture).source
        for architecture in ("sm_80", "sm_90a")
        for head_dim in (80, 128)
    }
    assert sources == {
        ("sm_80", 80): "attention_prefill",
        ("sm_80", 128): "attention_prefill",
        ("sm_90a", 80): "attention_prefill",
        ("sm_90a", 128): "attention_prefill_wgmma",
    }


def test_kernel_specs_are_what_construction_loads(device: KernelDevice) -> None:
    class Recorder:
        architecture = "sm_90a"
        num_multiprocessors = 132

        def __init__(self) -> None:
            self.loaded: list[tuple[str, dict[str, Any]]] = []

        def function(self, source: str, name: str, shared_bytes: int = 0, **defines: Any) -> Any:
            self.loaded.append((source, defines))

    library, shape = Recorder(), shape_of(8, 2, 128)
    PagedAttention(library, shape, AttentionLimits(4, 64, 128))
    specs = attention_kernel_specs(shape, "sm_90a", has_alibi=False)
    assert [spec.source for spec in specs] == [source for source, _ in library.loaded]
    assert [dict(spec.defines) for spec in specs] == [
        {name: str(value) for name, value in defines.items()} for _, defines in library.loaded
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("shape", "has_alibi"),
    [
        (shape_of(8, 2, 128), False),
        (shape_of(14, 2, 80, 32, dtype="float16", window=9, soft_cap=5.0), True),
        (shape_of(8, 2, 64, dtype="float32"), False),
        (shape_of(4, 4, 128, has_prefix=True), False),
        (shape_of(8, 2, 128, has_fp8_pages=True), False),
        (shape_of(8, 1, 256, has_fp8_pages=True), False),
    ],
    ids=["plain", "every feature", "float32", "prefix", "codes", "codes of large heads"],
)
def test_kernels_compile_without_a_gpu(
    tmp_path: Path, shape: AttentionShape, has_alibi: bool, architecture: str
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    for spec in attention_kernel_specs(shape, architecture, has_alibi):
        cubin = compile_cubin(spec, architecture, tmp_path)
        assert cubin.startswith(b"\x7fELF")
        assert spec.source.encode() in cubin
        assert_weights_alone_are_read_early(cubin, load_source(spec.source), architecture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"head_dim": 264}, "head_dim=264"),
        ({"head_dim": 12}, "head_dim=12"),
        ({"block_size": 24}, "--block-size=24"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_shapes_without_a_kernel_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": "bfloat16", "scale": 1.0}
    with pytest.raises(ConfigError, match=message):
        AttentionShape(**{**values, **changes})


def test_misuse_is_refused(device: KernelDevice) -> None:
    run = DeviceCase(Case(shape_of(4, 2, 32), (1, 4), (9, 4)), device)
    keys, values = run.arrays["keys"], run.arrays["values"]
    with pytest.raises(ExecutorError, match="key_pages"):
        run.attention.decode(run.arrays["qkv"], keys[:, :1], values, run.out, run.step)
    with pytest.raises(ExecutorError, match="qkv is"):
        run.attention.prefill(run.arrays["qkv"][:, :64], keys, values, run.out, run.step)
    with pytest.raises(ExecutorError, match="workspace of 10 bytes"):
        run.attention.bind(device.poisoned((10,), np.uint8))
    fresh = PagedAttention(device.library, run.case.shape, AttentionLimits(1, 64, 64))
    with pytest.raises(ExecutorError, match="no workspace"):
        fresh.decode(run.arrays["qkv"], keys, values, run.out, run.step)
    fresh.bind(device.poisoned((fresh.workspace_bytes,), np.uint8))
    with pytest.raises(ExecutorError, match="max_num_seqs=1"):
        fresh.split_work(run.step)
