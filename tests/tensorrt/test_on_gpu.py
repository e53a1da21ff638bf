"""Engines on a GPU against the NumPy engine. Run by tests/gpu/run_tensorrt.sh with releases from 10.16, on no GPU yet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx import LLM, SamplingParams
from phalanx.parallel.launcher import launch_info
from phalanx.parallel.mpi_comm import world_communicator
from phalanx.runtime.request import RequestOutput

from ..quantization import writers
from ..quantization.test_checkpoints import ALL, CASE, WEIGHT_ONLY
from ..support.checkpoints import CASES_BY_NAME, write_checkpoint

pytestmark = pytest.mark.gpu

CASES = ("llama-grouped-heads", "llama-biases-llama3-rope", "gpt2-plain", "gemma-one-kv-head")
TOLERANCES = {"float32": 2e-4, "float16": 6e-2, "bfloat16": 0.5}
"""Largest error of a log-probability, as for the CUDA engine."""

QUANTISED = (
    "ct-w8-channel", "ct-w4-g64", "ct-w4-g16-asymmetric", "awq", "gptq-4-v1", "gptq-4-order", "ct-fp8-weight-only", "ct-fp8-channel",
    "ct-fp8-static", "ct-int8", "ct-int8-static", "hf-fp8-blocks", "fbgemm", "modelopt-smoothquant",
)  # fmt: skip

LIMITS = {"max_num_seqs": 5, "max_model_len": 96, "max_num_batched_tokens": 24}
PROMPT_LENGTHS = (1, 2, 17, 40, 33, 5, 64)


@pytest.fixture
def checkpoint() -> Callable[[str], Path]:
    """Writes a case on rank 0, to a place that all ranks know: pytest's own folders differ by process."""
    folder = Path(tempfile.gettempdir()) / "phalanx-tensorrt-checkpoints"

    def write(name: str) -> Path:
        if launch_info().rank == 0:
            write_checkpoint(CASES_BY_NAME[name], folder / name)
        comm = world_communicator()
        comm.barrier()
        comm.close()
        return folder / name

    return write


@pytest.fixture
def quantised() -> Callable[[str], tuple[Path, Path]]:
    """Writes a quantised checkpoint, and a float one with the values that it stands for, as ``checkpoint`` does."""
    folder = Path(tempfile.gettempdir()) / "phalanx-tensorrt-quantised"

    def write(name: str) -> tuple[Path, Path]:
        paths = folder / name / "quantised", folder / name / "twin"
        if launch_info().rank == 0 and not paths[1].exists():
            module, section = ALL[name]
            writers.write(write_checkpoint(CASE, folder / "dense"), *paths, module, section)
        comm = world_communicator()
        comm.barrier()
        comm.close()
        return paths

    return write


def _run(path: Path, engine: str, dtype: str, params: SamplingParams) -> list[RequestOutput]:
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 97, length).tolist() for length in PROMPT_LENGTHS]
    with LLM(path, engine=engine, dtype=dtype, **LIMITS) as llm:
        return llm.generate(prompts, params)


def _logprobs(outputs: list[RequestOutput]) -> np.ndarray[Any, Any]:
    prompt = [entry.logprob for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
    return np.array(prompt + [entry.logprob for output in outputs for entry in output.logprobs or ()])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_the_numpy_engines(name: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    """Prompt and decoding, prefill in pieces; on as many tensor-parallel ranks as were started."""
    path = checkpoint(name)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    expected, found = (_run(path, engine, dtype, params) for engine in ("numpy", "tensorrt"))
    if dtype == "float32":
        assert [output.token_ids for output in found] == [output.token_ids for output in expected]
        np.testing.assert_allclose(_logprobs(found), _logprobs(expected), atol=TOLERANCES[dtype])
    else:  # after a near tie the texts part ways; prompts are the same
        size = sum(len(output.prompt_token_ids) - 1 for output in expected)
        errors = np.abs(_logprobs(found)[:size] - _logprobs(expected)[:size])
        assert errors.max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_checkpoints_are_the_numpy_engines(name: str, quantised: Callable[[str], tuple[Path, Path]]) -> None:
    """On any number of ranks, each of which scales its own columns of inputs: codes may differ, and cost what the twin shows."""
    path, twin = quantised(name)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    outputs = [_run(path, "numpy", "float16", params), _run(path, "tensorrt", "float16", params)]
    outputs.append(_run(twin, "numpy", "float16", params))
    size = sum(len(output.prompt_token_ids) - 1 for output in outputs[0])
    expected, found, plain = (_logprobs(one)[:size] for one in outputs)
    if name in WEIGHT_ONLY:
        assert np.abs(found - expected).max() <= TOLERANCES["float16"]
    else:
        assert np.abs(found - expected).mean() <= 2 * np.abs(plain - expected).mean()


def test_captured_decoding_repeats_itself(checkpoint: Callable[[str], Path]) -> None:
    """The first steps of each shape run without a graph, later ones replay it."""
    path = checkpoint("llama-grouped-heads")
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with LLM(path, engine="tensorrt", dtype="float32", **LIMITS) as llm:
        runs = [[output.token_ids for output in llm.generate([[5, 6, 7], [8]], params)] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
