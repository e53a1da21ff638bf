"""Starts of models of real widths on a device that computes nothing: launches within CUDA's limits, nothing new within a capture, memory as planned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.compiler import compile_cubin, load_source
from phalanx.kernels.cublaslt import GemmProblem
from phalanx.kernels.packed import PackedWeight
from phalanx.launch.plan import main as plan
from phalanx.launch.start_block import describe
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.cuda import build
from phalanx.runtime.executors.cuda.executor import CudaExecutor
from phalanx.runtime.executors.cuda.graphs import DECODE_ROWS
from phalanx.runtime.llm import LLM
from tests.support.dry_device import DryDevice, install_dry_device
from tests.support.sass import assert_weights_alone_are_read_early

MODELS = Path(__file__).parents[1] / "gpu" / "models"
SIZES: dict[str, Any] = {
    "max_num_seqs": 1024, "max_num_batched_tokens": 2048, "max_model_len": 4096, "num_kv_blocks": 512, "kv_cache_dtype": "fp8"
}  # fmt: skip


def written(root: Path, name: str, **fields: Any) -> Path:
    """Two layers of a model of ``tests/gpu/models``, with some fields as given."""
    config = json.loads((MODELS / name / "config.json").read_text()) | {"num_hidden_layers": 2, **fields}
    (root / "config.json").write_text(json.dumps(config))
    return root


def start(path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    executors: list[CudaExecutor] = []

    def recorded(*arguments: Any) -> CudaExecutor:
        executors.append(CudaExecutor(*arguments))
        return executors[-1]

    monkeypatch.setattr(build, "CudaExecutor", recorded)
    with LLM(path, engine="cuda", load_format="dummy", **SIZES):
        return executors[0]


def held(executor: CudaExecutor) -> Iterator[Any]:
    for weight in executor._stage.ops.weights.values():
        for array in weight.components.values():
            yield from (
                (array.codes, array.scale, array.zero, array.blocks) if isinstance(array, PackedWeight) else [array]
            )


@pytest.mark.parametrize("accepts_others", [True, False])
def test_a_start_of_fp8_blocks_captures_every_step_and_holds_what_was_planned(
    accepts_others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether algorithms that were timed compute other numbers of tokens, too, or not; more than 64 are multiplied as codes."""
    device = install_dry_device(monkeypatch, accepts_others)
    executor, sizes = start(written(tmp_path, "qwen3-8b-blocks"), monkeypatch), DECODE_ROWS.sizes(1024)
    assert device.num_captured > 2 * len(sizes)
    assert executor.products == "fp8 blocks as codes above 64 tokens"
    shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]
    for size in sizes:
        of_codes = [GemmProblem(size, *shape, "fp8", "bfloat16", has_blocks=True) for shape in shapes]
        assert [problem in device.problems for problem in of_codes] == [size > 64] * len(shapes)
    limits = ["--max-num-seqs", "1024", "--max-num-batched-tokens", "2048"]
    plan(["--model", str(tmp_path), "--kv-cache-dtype", "fp8", *limits, "--json"])
    (planned,) = json.loads(capsys.readouterr().out)["ranks"]
    arrays = {array.ctypes.data: array for array in held(executor) if array is not None}
    assert sum(array.nbytes for array in arrays.values()) == planned["weight_bytes"]


@pytest.mark.parametrize(
    ("multiplies", "words"),
    [(True, "fp8 blocks as codes above 64 tokens, gate_up as values"), (False, "fp8 blocks as values")],
)
def test_the_start_block_says_how_blocks_are_multiplied(
    multiplies: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12,352 gates end within a block, so ups begin there."""
    install_dry_device(monkeypatch, multiplies_blocks=multiplies)
    directory = written(tmp_path, "qwen3-8b-blocks", intermediate_size=12352)
    sizes = {**SIZES, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    with LLM(directory, engine="cuda", load_format="dummy", **sizes) as llm:
        facts = describe(llm._replica, "qwen", "here", "")
    assert facts["products"] == words
    assert facts["quantisation"].startswith("weights: fp8 blocks in groups of 128, activations likewise")


ARCHITECTURES = pytest.mark.parametrize(
    ("architecture", "num_multiprocessors", "most_shared_bytes"),
    [
        ("sm_80", 108, 166_912),
        ("sm_89", 142, 101_376),
        ("sm_90a", 132, 232_448),
        ("sm_100a", 148, 232_448),
        ("sm_120", 188, 101_376),
    ],
)
FORMATS = pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("llama-3-8b", "none"),
        ("llama-3-8b", "fp8"),
        ("llama-3-8b", "int8"),
        ("llama-3-8b-w4a16", "none"),
        ("qwen3-8b-blocks", "none"),
        ("mixtral-8x7b", "int8"),
    ],
)


@pytest.mark.parametrize(
    ("name", "quantize"), [("llama-3-8b", "fp8"), ("llama-3-8b", "int8"), ("llama-3-8b-w4a16", "none"), ("qwen3-8b-blocks", "none")]
)  # fmt: skip
def test_formats_start_on_ada(name: str, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products that cuBLASLt has there, within the shared memory of a block, and with all that a capture needs known before."""
    started_on("sm_89", 142, 101_376, name, quantize, tmp_path, monkeypatch)


@pytest.mark.slow
@ARCHITECTURES
@FORMATS
def test_formats_start_on_every_kind_of_gpu_and_their_kernels_compile(
    name: str, quantize: Any, architecture: str, num_multiprocessors: int, most_shared_bytes: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Each kernel as it is asked for there: the assembler refuses what does not fit a block, and compilers move loads ahead of waits."""
    device = started_on(architecture, num_multiprocessors, most_shared_bytes, name, quantize, tmp_path, monkeypatch)
    for spec, _ in device.kernels:
        cubin = compile_cubin(spec, architecture, request.config.cache.mkdir("kernels-of-starts"))
        assert_weights_alone_are_read_early(cubin, load_source(spec.source), architecture)


def started_on(
    architecture: str, num_multiprocessors: int, most_shared_bytes: int, name: str, quantize: Any, directory: Path,
    patch: pytest.MonkeyPatch,
) -> DryDevice:  # fmt: skip
    """Where such a model has been started, or refused by name."""
    device = install_dry_device(patch, multiplies_blocks=architecture == "sm_90a")  # what a start finds out
    device.architecture, device.num_multiprocessors = architecture, num_multiprocessors
    device.has_clusters, device.most_shared_bytes = architecture in ("sm_90a", "sm_100a", "sm_120"), most_shared_bytes
    sizes = {**SIZES, "max_num_seqs": 64}
    llm = partial(LLM, written(directory, name), engine="cuda", load_format="dummy", quantize=quantize, **sizes)
    if architecture == "sm_80" and quantize == "fp8":
        with pytest.raises(ConfigError, match=r"products need compute capability 8\.9"):
            llm()
    else:
        llm().close()
        assert device.num_captured > 64
    return device


def test_what_a_device_refuses_is_an_error() -> None:
    device = DryDevice()
    launch = device.function("add", "add", SCALAR="float")
    for grid, block, shared in (
        ((1,), (2048,), 0),
        ((1, 1 << 16), (32,), 0),
        ((0,), (32,), 0),
        ((1,), (32,), 64 << 10),
    ):
        with pytest.raises(AssertionError, match="add"):
            launch(grid, block, (np.int32(1),), shared)
    device.is_capturing = True
    device.function("add", "add", SCALAR="float")
    with pytest.raises(AssertionError, match=r"add of add\.cu is loaded .* while a step is captured"):
        device.function("add", "add", SCALAR="__half")


def test_products_of_values_are_timed_with_the_bias_that_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``attention_bias`` q, k, v and the output of attention have one; gates, ups and downs have none."""
    install_dry_device(monkeypatch)
    executor = start(written(tmp_path, "qwen3-8b-blocks", attention_bias=True), monkeypatch)
    problems = executor._stage.ops._gemm.problems
    found = {
        (one.out_features, one.in_features, one.has_bias) for one in problems if one.packed and one.num_tokens > 64
    }
    assert found == {(6144, 4096, True), (4096, 4096, True), (4096, 12288, False), (24576, 4096, False)}
