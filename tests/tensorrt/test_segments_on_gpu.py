"""TensorRT 8.6's segments on a GPU. Run by tests/gpu/run_tensorrt.sh, under ``mpirun -n 2`` on two GPUs, too."""

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

from ..support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint

pytestmark = pytest.mark.gpu

GPT2 = CheckpointCase("gpt2-heads-of-8", {**CASES_BY_NAME["gpt2-plain"].config, "n_head": 6})
CASES = {
    "llama-grouped-heads": CASES_BY_NAME["llama-grouped-heads"], "gpt2-heads-of-8": GPT2,
    "gemma-one-kv-head": CASES_BY_NAME["gemma-one-kv-head"], "qwen3-windows": CASES_BY_NAME["qwen3-windows"],
    "falcon-alibi": CASES_BY_NAME["falcon-alibi"], "gemma2-caps": CASES_BY_NAME["gemma2-caps"],
    "gpt_neox-parallel": CASES_BY_NAME["gpt_neox-parallel"], "mixtral-plain": CASES_BY_NAME["mixtral-plain"],
}  # fmt: skip
"""Three families and, with what TensorRT's own attention lacks, five more."""

LIMITS: dict[str, Any] = {
    "max_num_seqs": 5, "max_model_len": 96, "max_num_batched_tokens": 24, "num_kv_blocks": 64,
}  # fmt: skip
PROMPT_LENGTHS = (1, 2, 17, 40, 33, 5, 64)
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}
NEAR_TIE = 0.05
"""Difference of log-probabilities within which float16 may choose either token."""


@pytest.fixture
def checkpoint() -> Callable[[str], Path]:
    """Writes a case on rank 0, to a place that all ranks know: pytest's own folders differ by process."""
    folder = Path(tempfile.gettempdir()) / "phalanx-segments-checkpoints"

    def write(name: str) -> Path:
        if launch_info().rank == 0:
            write_checkpoint(CASES[name], folder / name)
        comm = world_communicator()
        comm.barrier()
        comm.close()
        return folder / name

    return write


def _run(
    path: Path, engine: str, dtype: str, params: SamplingParams, tp: int = 1, pp: int = 1, **options: Any
) -> list[RequestOutput]:  # fmt: skip
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 90, length).tolist() for length in PROMPT_LENGTHS]
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    with LLM(path, engine=engine, dtype=dtype, **sizes, **options, **LIMITS) as llm:
        return llm.generate(prompts, params)


def _layouts() -> list[tuple[int, int]]:
    return LAYOUTS.get(launch_info().size, [])


@pytest.mark.parametrize("layout", _layouts(), ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
@pytest.mark.parametrize("name", CASES)
def test_32_greedy_tokens_in_float16_are_the_cuda_engines_up_to_ties(
    name: str, layout: tuple[int, int], checkpoint: Callable[[str], Path]
) -> None:
    """Prompts in chunks through five sequences; where texts part, the two tokens' probabilities are nearly equal."""
    path, (tp, pp) = checkpoint(name), layout
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, logprobs=4)
    expected, found = (_run(path, engine, "float16", params, tp, pp) for engine in ("cuda", "tensorrt"))
    for one, other in zip(expected, found, strict=True):
        parted = next(
            (i for i, pair in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if len(set(pair)) > 1), None
        )
        if parted is not None:
            assert one.logprobs is not None
            choices = dict(one.logprobs[parted].top)
            assert one.logprobs[parted].logprob - choices.get(other.token_ids[parted], -np.inf) < NEAR_TIE, (
                name,
                parted,
            )


@pytest.mark.parametrize("layout", _layouts(), ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
@pytest.mark.parametrize("name", ["llama-grouped-heads", "gpt2-heads-of-8"])
def test_float32_tokens_and_log_probabilities_are_the_numpy_engines(
    name: str, layout: tuple[int, int], checkpoint: Callable[[str], Path]
) -> None:
    path, (tp, pp) = checkpoint(name), layout
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    expected, found = (_run(path, engine, "float32", params, tp, pp) for engine in ("numpy", "tensorrt"))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other in zip(expected, found, strict=True):
        wanted, seen = (
            [
                entry.logprob
                for entry in (*(output.prompt_logprobs or ())[1:], *(output.logprobs or ()))
                if entry is not None
            ]
            for output in (one, other)
        )
        np.testing.assert_allclose(seen, wanted, atol=2e-4)


@pytest.mark.parametrize("layout", _layouts(), ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
def test_an_fp8_cache_is_the_cuda_engines(layout: tuple[int, int], checkpoint: Callable[[str], Path]) -> None:
    """Rounding of float16 moves some codes; what the cache costs is more."""
    path, (tp, pp) = checkpoint("llama-grouped-heads"), layout
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    runs = (("cuda", "fp8"), ("tensorrt", "fp8"), ("cuda", "auto"))
    outputs = [_run(path, engine, "float16", params, tp, pp, kv_cache_dtype=cache) for engine, cache in runs]
    expected, found, plain = (
        np.array([entry.logprob for one in output for entry in one.prompt_logprobs or () if entry is not None])
        for output in outputs
    )
    assert np.abs(found - expected).mean() < np.abs(plain - expected).mean() / 2


@pytest.mark.parametrize("layout", _layouts(), ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
def test_graphs_of_some_sizes_replay_right_after_steps_of_others(
    layout: tuple[int, int], checkpoint: Callable[[str], Path]
) -> None:
    """Engines' contexts are shared by all sizes: batches of one to five sequences, in turn, three times each."""
    path, (tp, pp) = checkpoint("llama-grouped-heads"), layout
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    prompts = [[5, 6, 7], [8], [9, 3, 11, 4], [20], [21, 22]]
    with LLM(path, engine="tensorrt", dtype="float32", **sizes, **LIMITS) as llm:
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
        for count in (5, 2, 4, 3, 1) * 3:
            assert [output.token_ids for output in llm.generate(prompts[:count], params)] == alone[:count]
