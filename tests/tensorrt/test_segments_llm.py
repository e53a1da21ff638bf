"""``--engine tensorrt`` of TensorRT 8.6 without a GPU: the CUDA executor on emulated kernels, its segments interpreted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from launch import build as launch_build
from phalanx import LLM, SamplingParams
from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout
from phalanx.runtime.executors.cuda.ops import CudaOps
from phalanx.runtime.executors.tensorrt import build as trt_build
from phalanx.runtime.executors.tensorrt import installed
from phalanx.runtime.executors.tensorrt import library as library_module
from phalanx.runtime.executors.tensorrt.segments.program import SegmentCall
from phalanx.runtime.executors.tensorrt.segments.runner import DeviceSegments

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from ..support.fake_cupy import install_fake_device
from .library8 import BoundTensorRT8

LIMITS = {"max_num_seqs": 3, "max_model_len": 48, "max_num_batched_tokens": 12, "num_kv_blocks": 12}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> BoundTensorRT8:
    """Emulated kernels, and a TensorRT 8.6 whose engines are interpreted; they are built and kept as real ones are."""
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))
    bound = BoundTensorRT8.over(pytest.importorskip("tensorrt_rtx_bindings"))
    monkeypatch.setattr(trt_build, "load_tensorrt", lambda: bound)
    monkeypatch.setattr(trt_build, "open_device", lambda library: (None, None, "9.0"))
    return bound


def _params() -> list[SamplingParams]:
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    scored = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    sampled = SamplingParams(max_tokens=6, temperature=0.9, seed=3, top_k=20, ignore_eos=True)
    return [greedy, scored, sampled, greedy, scored]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama-grouped-heads", Layout()), ("llama-grouped-heads", Layout(tp=2, pp=2)), ("gpt_neox-parallel", Layout(pp=2)),
     ("qwen3-windows", Layout()), ("bloom-six-heads", Layout(tp=2)), ("gemma2-caps", Layout())],
    ids=lambda value: value if isinstance(value, str) else f"tp{value.tp}pp{value.pp}",
)  # fmt: skip
def test_requests_get_the_numpy_engines_tokens(
    name: str, layout: Layout, tmp_path: Path, library: BoundTensorRT8
) -> None:
    """Prompts in chunks, decoding together, log-probabilities of prompts, sampling: also with what 8.6's networks lack."""
    path = write_checkpoint(CASES_BY_NAME[name], tmp_path / "model")
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 90, length).tolist() for length in (7, 9, 20, 3, 13)]

    def body(engine: str, comm: Communicator) -> list[Any]:
        sizes = {"tensor_parallel_size": layout.tp, "pipeline_parallel_size": layout.pp} if comm.size > 1 else {}
        with LLM(path, comm=comm, engine=engine, dtype="float32", **sizes, **LIMITS) as llm:
            outputs = llm.generate(prompts, _params())
        return [(output.token_ids, [one.logprob for one in output.logprobs or ()]) for output in outputs]

    expected = body("numpy", SelfCommunicator())
    size = layout.world_size
    found = run_ranks(size, lambda comm: body("tensorrt", comm)) if size > 1 else [body("tensorrt", SelfCommunicator())]
    for rank in found:
        assert [tokens for tokens, _ in rank] == [tokens for tokens, _ in expected]
        scores, wanted = (np.concatenate([values for _, values in results]) for results in (rank, expected))
        np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_engines_are_built_once_for_all_layers_kept_and_found_again(tmp_path: Path, library: BoundTensorRT8) -> None:
    """Float32 without TF32, types obeyed, one timing cache, profiles for a few tokens and for all."""
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    for _ in range(2):
        with LLM(path, engine="tensorrt", dtype="float32", **LIMITS):
            pass
    configs = library.module.configs
    assert len(configs) == 6  # first block's, between blocks, last block's, final norm with and without a sum, head
    assert all(config.flags == ["obey", "not tf32"] for config in configs)
    assert [len(config.cache) for config in configs] == [1, 2, 3, 4, 5, 6]
    assert [shapes["x.0"][2][0] for shapes in configs[0].profiles] == [3, 8, 12]
    assert [shapes["x.0"][0][0] for shapes in configs[0].profiles] == [1, 4, 9]
    assert len(list((tmp_path / "cache" / "engines").glob("*/*.engine"))) == 1


def test_a_step_calls_an_engine_with_one_number_of_rows(
    tmp_path: Path, library: BoundTensorRT8, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape must not change in a capture: blocks before the last attention have all rows, those after it may have fewer."""
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    steps: list[dict[tuple[Any, bool], set[int]]] = []
    bind, run = CudaOps.bind, DeviceSegments.run

    def begin(ops: CudaOps, *arguments: Any) -> None:
        steps.append({})
        bind(ops, *arguments)

    def note(runner: DeviceSegments, call: SegmentCall, inputs: Any, weights: Any, outputs: Any) -> None:
        steps[-1].setdefault((call.segment, call.is_tail), set()).add(len(outputs[0]))
        run(runner, call, inputs, weights, outputs)

    monkeypatch.setattr(CudaOps, "bind", begin)
    monkeypatch.setattr(DeviceSegments, "run", note)

    def body(comm: Communicator) -> None:
        with LLM(path, comm=comm, engine="tensorrt", dtype="float32", tensor_parallel_size=2, **LIMITS) as llm:
            llm.generate([[5, 6, 7, 8, 9], [4]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))

    run_ranks(2, body)
    assert all(len(rows) == 1 for step in steps for rows in step.values())
    narrowed = [step for step in steps if len({count for rows in step.values() for count in rows}) > 1]
    assert narrowed  # some steps went on with fewer rows


def test_engines_that_launch_build_made_serve_any_checkpoint_of_the_shape_within_their_sizes(
    tmp_path: Path, library: BoundTensorRT8, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installed, "load_tensorrt", lambda: library)
    monkeypatch.setattr(library_module, "compute_capability", lambda: "9.0")
    path, engines = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model"), tmp_path / "engines"
    sizes = ["--max-num-seqs", "3", "--max-num-batched-tokens", "12"]
    assert launch_build.main(["--model", str(path), "--output", str(engines), "--dtype", "float32", *sizes]) == 0
    assert capsys.readouterr().out.strip() == str(engines / "model_float32_tp1_pp1_rank0.engine")
    config = json.loads((engines / "config.json").read_text())
    assert (config["tensorrt"], config["weights_checksum"]) == ("tensorrt 8.6.0", "")
    built = len(library.module.configs)
    other = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "other", seed=7)
    with LLM(other, engine="tensorrt", engine_dir=engines, dtype="float32", **LIMITS) as llm:
        assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
    assert len(library.module.configs) == built
    with pytest.raises(ConfigError, match="--max-num-batched-tokens=13 exceeds the 12 that the engines were built for"):
        LLM(path, engine="tensorrt", engine_dir=engines, dtype="float32", **{**LIMITS, "max_num_batched_tokens": 13})


def test_segments_work_with_an_fp8_cache(tmp_path: Path, library: BoundTensorRT8) -> None:
    """The cache is the CUDA executor's; its codes differ from plain values by more than arithmetic does."""
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=0)

    def scores(engine: str, cache: str) -> Any:
        with LLM(path, engine=engine, dtype="float16", kv_cache_dtype=cache, **LIMITS) as llm:
            (output,) = llm.generate([[5, 17, 3, 99, 42, 8, 61]], params)
        return np.array([one.logprob for one in output.prompt_logprobs if one is not None])

    expected, plain, found = scores("numpy", "fp8"), scores("numpy", "auto"), scores("tensorrt", "fp8")
    assert np.abs(found - expected).max() < np.abs(plain - expected).max() / 2


@pytest.mark.parametrize("capability", ["7.5", "10.0"])
def test_a_gpu_older_or_newer_than_its_kernels_is_refused(capability: str, library: BoundTensorRT8) -> None:
    with pytest.raises(ConfigError, match=rf"{capability} is outside 8.0 to 9.0, .* use --engine cuda"):
        library.check_target(capability)
