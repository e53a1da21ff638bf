"""NVRTC without a GPU: every kernel compiles for every architecture that we name, and the cache does what it says."""

import multiprocessing
import re

import pytest

from phalanx.kernels import compiler
from phalanx.kernels.compiler import KernelSource, KernelSpec, architecture_name, compile_cubin, load_source
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.runtime.sampling.fields import SAMPLING_STRUCT
from tests.support import sass
from tests.support.sass import assert_weights_alone_are_read_early

pytest.importorskip("cuda.bindings.nvrtc")

ROW = {"HIDDEN_SIZE": 4096, "VEC": 8, "NUM_THREADS": 256}
ROWS = {"VEC": 8, "NUM_THREADS": 512, "CLUSTER": 1, "SAMPLING_STRUCT": SAMPLING_STRUCT}
EXPERTS = {"GATED": 1, "ACTIVATION": "silu", "GATHERS": 1, "TOP_K": 2}
HEADS = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "NUM_THREADS": 128}
GROUPS = {"QUANTIZED": 1, "STATIC_SCALE": 0, "GROUPS": 1, "POWERS_OF_TWO": 1}
SPECS = [
    ("embedding", ROW),
    ("position_embedding", ROW),
    ("gather_rows", ROW),
    ("add_bias", ROW),
    ("head_norm", HEADS | {"OWN_WEIGHTS": 0, "LAYER_NORM": 0, "HAS_BIAS": 0}),
    ("head_norm", HEADS | {"OWN_WEIGHTS": 1, "LAYER_NORM": 1, "HAS_BIAS": 1}),
    ("scale_and_clip", {"VEC": 8, "NUM_THREADS": 256}),
    ("soft_cap", {"VEC": 8, "NUM_THREADS": 256}),
    ("norm", ROW | {"LAYER_NORM": 0, "HAS_RESIDUAL": 1, "HAS_WEIGHT": 1, "HAS_BIAS": 0, "QUANTIZED": 1, "STATIC_SCALE": 0, "GROUPS": 0}),
    ("norm", ROW | {"LAYER_NORM": 1, "HAS_RESIDUAL": 1, "HAS_WEIGHT": 1, "HAS_BIAS": 1, "QUANTIZED": 0, "STATIC_SCALE": 0, "GROUPS": 0}),
    ("norm", ROW | {"LAYER_NORM": 0, "HAS_RESIDUAL": 1, "HAS_WEIGHT": 1, "HAS_BIAS": 0, **GROUPS}),
    *(
        ("unpack_weight", {"CODES": codes, "GROUP": 128, "HAS_ZERO": zero, "NUM_THREADS": 128, "BFLOAT16": 0, "KV_FP8": 0})
        for codes, zero in ((1, 0), (4, 1), (8, 1))
    ),
    ("pack_weight", {"CODES": 4, "GROUP": 128, "HAS_ZERO": 1, "VEC": 8, "NUM_THREADS": 128}),
    ("unpack_ordered", {"HAS_ZERO": 1, "NUM_THREADS": 256}),
    *(
        ("round_inputs", {"COLUMNS": 14336, "SPAN": group or 1024, "GROUP": group, "HAS_FACTORS": int(not group), "NUM_THREADS": 128,
                          "QUANTIZED": int(group > 0), "STATIC_SCALE": 0, "POWERS_OF_TWO": 0})
        for group in (0, 128)
    ),
    ("quantize_groups", {"COLUMNS": 14336, "VEC": 4, "GATED": 1, "ACTIVATION": "silu", **GROUPS}),
    *(("scale_sums", {"SUM": kind, "VEC": 4, "NUM_THREADS": 256, "HAS_BIAS": 1}) for kind in ("int", "float")),
    *(
        (
            "gemv_packed",
            {"CODES": codes, "GROUP": group, "HAS_ZERO": zero, "NUM_WARPS": 8, "ROW_BLOCKS": 2, "UNROLL": 2, "TOKEN_TILES": 2,
             "WHOLE_CHUNKS": 0, "GATED": 0, "ACTIVATION": "silu", "HAS_BIAS": 1},
        )
        for codes, group, zero in ((4, 32, 1), (8, 128, 1), (1, 0, 0))
    ),
    *(
        ("quantize_rows", {"COLUMNS": 14336, "VEC": 8, "NUM_THREADS": threads, "QUANTIZED": 1, "STATIC_SCALE": 0})
        for threads in (224, 896)
    ),
    *(
        ("gated_quantized", {"FEATURES": 16384, "VEC": 8, "NUM_THREADS": threads, "ACTIVATION": "gelu_tanh", "QUANTIZED": 2,
                             "STATIC_SCALE": 0})
        for threads in (256, 1024)
    ),
    ("activation", {"FEATURES": 11008, "VEC": 8, "NUM_THREADS": 256, "ACTIVATION": "gelu_erf"}),
    (
        "rotary_kv_write",
        {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK_SIZE": 16, "VEC": 8,
         "PARTS": 1, "INTERLEAVED": 0, "KV_FP8": 1, "NUM_THREADS": 128},
    ),
    (
        "rotary_kv_write",
        {"NUM_HEADS": 32, "NUM_KV_HEADS": 32, "HEAD_DIM": 128, "ROTARY_DIM": 64, "BLOCK_SIZE": 16, "VEC": 8,
         "PARTS": 2, "INTERLEAVED": 0, "KV_FP8": 0, "NUM_THREADS": 128},
    ),
    ("all_reduce", {"RANK": 0, "NUM_RANKS": 2, "NUM_THREADS": 128, "HAS_TAIL": 0}),
    ("all_reduce", {"RANK": 5, "NUM_RANKS": 8, "NUM_THREADS": 512, "HAS_TAIL": 1}),
    ("adjust_logits", {"VEC": 8, "NUM_THREADS": 256, "SLICE": 8192, "SAMPLING_STRUCT": SAMPLING_STRUCT}),
    ("local_argmax", {"VEC": 8, "NUM_THREADS": 256, "SAMPLING_STRUCT": SAMPLING_STRUCT}),
    ("merge_argmax", {"NUM_THREADS": 128}),
    ("sample_rows", ROWS),
    ("log_probabilities", ROWS),
    (
        "gemv8",
        {"NUM_WARPS": 8, "ROW_BLOCKS": 2, "UNROLL": 2, "TOKEN_TILES": 2, "WHOLE_ROUNDS": 0, "HAS_BIAS": 1, "QUANTIZED": 2},
    ),
    (
        "gemv8",
        {"NUM_WARPS": 16, "ROW_BLOCKS": 1, "UNROLL": 2, "TOKEN_TILES": 1, "WHOLE_ROUNDS": 1, "HAS_BIAS": 0, "QUANTIZED": 1},
    ),
    (
        "gemv",
        {"NUM_WARPS": 8, "ROW_BLOCKS": 2, "UNROLL": 4, "PREFETCH_BYTES": 4096, "MANY": 1, "GATED": 1, "ACTIVATION": "silu", "HAS_BIAS": 0},
    ),
    (
        "experts_route",
        {"NUM_EXPERTS": 128, "TOP_K": 8, "RENORMALISE": 1, "FEATURES": 2048, "VEC": 8, "TOKENS": 8, "FIRST": 0,
         "NUM_LOCAL": 128, "ROWS": 64},
    ),
    ("sigmoid_gate", {"FEATURES": 2048, "VEC": 8, "NUM_THREADS": 256}),
    ("experts_combine", {"FEATURES": 2048, "VEC": 8, "NUM_THREADS": 256, "TOP_K": 8}),
    *(
        (source, EXPERTS | {"CODES": codes, "GROUP": group, "HAS_ZERO": zero} | more)
        for codes, group, zero in ((0, 0, 0), (1, 128, 0), (4, 32, 1))
        for source, more in (
            ("experts_stream", {"NUM_WARPS": 8, "ROW_BLOCKS": 2, "UNROLL": 1, "WHOLE_CHUNKS": 0}),
            ("experts_plain", {"WARPS": 4, "ROWS": 16, "VEC": 4}),
            *(("experts_tiles", {"ROWS": 128, "STAGES": 3, "SHARED_BYTES": 98304, "MIN_BLOCKS": blocks, "BFLOAT16": 0, "KV_FP8": 0})
              for blocks in (1, 2)),
        )
    ),
]  # fmt: skip
TILES = {"SCALAR": "__nv_bfloat16", "CLUSTER": 2, "SHARED_BYTES": 232448}
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
SMALL = KernelSpec.of("add_bias", {"SCALAR": "float", "HIDDEN_SIZE": 32, "VEC": 4, "NUM_THREADS": 32})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "defines"), SPECS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_kernel_compiles_without_a_gpu(cache, source, defines, architecture):
    scalar = {"SCALAR": "__half" if architecture == "sm_80" else "__nv_bfloat16"}
    cubin = compile_cubin(KernelSpec.of(source, defines | scalar), architecture, cache)
    assert cubin.startswith(b"\x7fELF")
    for name in re.findall(r'extern "C" __global__ void [^(]*\([^)]*\)\s*(\w+)\(', load_source(source).text):
        assert name.encode() in cubin
    assert_weights_alone_are_read_early(cubin, load_source(source), architecture)


EARLY = """
#include "launch.cuh"
extern "C" __global__ void add(const float* x, const float* bias, float* out, int size) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    const float early = bias[index % size];
    wait_for_previous();
    out[index] = x[index] + early;
}
"""


@pytest.mark.skipif(not sass.can_disassemble(), reason="nvidia-cuda-nvdisasm is not installed")
@pytest.mark.parametrize("architecture", sorted(sass.PARAMETER_BASE))
def test_loads_ahead_of_the_wait_are_found_with_their_parameter(monkeypatch, architecture):
    source = KernelSource("add", EARLY, "", True)
    cubin = compiler._compile(source, (f"-arch={architecture}",))
    (load,) = sass.early_accesses(cubin, source.text, architecture)["add"]
    assert load.pointers == {"bias"}
    with pytest.raises(AssertionError, match=r"add reads \['bias'\] too early: 'LDG"):
        assert_weights_alone_are_read_early(cubin, source, architecture)
    monkeypatch.setitem(sass.WEIGHTS, "add", frozenset({"bias"}))
    assert_weights_alone_are_read_early(cubin, source, architecture)


@pytest.mark.skipif(not sass.can_disassemble(), reason="nvidia-cuda-nvdisasm is not installed")
def test_a_kernel_that_does_not_wait_is_found():
    source = KernelSource("add", EARLY.replace("wait_for_previous();", ""), "", True)
    cubin = compiler._compile(source, ("-arch=sm_90a",))
    with pytest.raises(ValueError, match="add does not wait for the kernel before it"):
        sass.early_accesses(cubin, source.text, "sm_90a")


@pytest.mark.parametrize("architecture", ["sm_89", "sm_120"])
def test_products_of_codes_compile_for_other_architectures(cache, architecture):
    for source, defines in SPECS:
        if source == "gemv8":
            spec = KernelSpec.of(source, defines | {"SCALAR": "__nv_bfloat16"})
            assert compile_cubin(spec, architecture, cache).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    "defines",
    [
        {"QUANTIZED": 1, "GATED": 1, "ACTIVATION": "silu", "HAS_BIAS": 0},
        {"QUANTIZED": 2, "GATED": 0, "ACTIVATION": "relu", "HAS_BIAS": 1},
    ],
)
def test_tiles_of_codes_compile_on_hopper(cache, defines):
    cubin = compile_cubin(KernelSpec.of("gemm8_tiles", defines | TILES), "sm_90a", cache)
    assert_weights_alone_are_read_early(cubin, load_source("gemm8_tiles"), "sm_90a")


def test_row_sampling_compiles_with_clusters_on_hopper(cache):
    for source in ("sample_rows", "log_probabilities"):
        spec = KernelSpec.of(source, ROWS | {"CLUSTER": 8, "SCALAR": "__nv_bfloat16"})
        assert compile_cubin(spec, "sm_90a", cache).startswith(b"\x7fELF")


def test_a_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = compile_cubin(SMALL, "sm_80", tmp_path)
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_cubin(SMALL, "sm_80", tmp_path) == first


@pytest.mark.parametrize("damage", [b"", b"short", lambda data: data[:-1], lambda data: b"\0" * 32 + data[32:]])
def test_a_damaged_entry_is_compiled_again(tmp_path, damage):
    first = compile_cubin(SMALL, "sm_80", tmp_path)
    (entry,) = (tmp_path / "kernels").glob("*.cubin")
    entry.write_bytes(damage(entry.read_bytes()) if callable(damage) else damage)
    assert compile_cubin(SMALL, "sm_80", tmp_path) == first
    assert entry.read_bytes().endswith(first)


def test_the_key_covers_defines_architecture_headers_and_compiler(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiler, "_compile", lambda source, options: compiled.append(options) or b"cubin")
    compile_cubin(SMALL, "sm_80", tmp_path)
    compile_cubin(SMALL, "sm_80", tmp_path)
    assert len(compiled) == 1
    compile_cubin(SMALL, "sm_90a", tmp_path)
    compile_cubin(KernelSpec.of("add_bias", dict(SMALL.defines) | {"VEC": 1}), "sm_80", tmp_path)
    assert len(compiled) == 3
    monkeypatch.setattr(compiler, "_nvrtc_version", lambda: "99.9")
    compile_cubin(SMALL, "sm_80", tmp_path)
    assert len(compiled) == 4
    header = tmp_path / "include"
    header.mkdir()
    for path in compiler.INCLUDE_DIRECTORY.iterdir():
        (header / path.name).write_text(path.read_text() + ("\n// changed\n" if path.name == "dtype.cuh" else ""))
    monkeypatch.setattr(compiler, "INCLUDE_DIRECTORY", header)
    compile_cubin(SMALL, "sm_80", tmp_path)
    assert len(compiled) == 5


def _compile_small(folder):
    return compile_cubin(SMALL, "sm_80", folder)


def test_many_processes_may_fill_one_cache(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(_compile_small, [tmp_path] * 6)
    assert len(set(results)) == 1
    assert len(list((tmp_path / "kernels").glob("*.cubin"))) == 1


def test_a_source_that_does_not_compile_says_where(tmp_path):
    broken = KernelSpec.of("add_bias", {"SCALAR": "float", "HIDDEN_SIZE": 32, "VEC": "?", "NUM_THREADS": 32})
    with pytest.raises(ExecutorError, match=r"(?s)add_bias.cu does not compile with .*-DVEC=\?.*error"):
        compile_cubin(broken, "sm_80", tmp_path)
    assert not list((tmp_path / "kernels").glob("*.cubin"))


def test_gpus_before_ampere_are_refused_in_one_sentence():
    assert [architecture_name(number) for number in ("80", "86", "90", "100", "120")] == [
        "sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"compute capability 7.5 is below 8.0; use an Ampere or later GPU"):
        architecture_name("75")


def test_every_source_names_its_licence_and_says_what_it_is():
    for path in sorted([*compiler.SOURCE_DIRECTORY.glob("*.cu"), *compiler.INCLUDE_DIRECTORY.glob("*.cuh")]):
        licence, *head = path.read_text().split("#include")[0].splitlines()
        assert licence == "// SPDX-License-Identifier: Apache-2.0", path.name
        assert len(head) >= (3 if path.suffix == ".cu" else 1), f"{path.name} does not say what it is"


def test_every_kernel_that_may_start_early_waits_for_the_one_before():
    for path in sorted(compiler.SOURCE_DIRECTORY.glob("*.cu")):
        if load_source(path.stem).overlaps_previous:
            kernels = path.read_text().split('extern "C" __global__')[1:]
            for kernel in kernels:
                assert kernel.count("wait_for_previous();") == 1, f"{path.name}: {kernel.strip().splitlines()[1][:60]}"
