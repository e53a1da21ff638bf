"""Logits and greedy continuations of every family equal transformers' in float32, in every layout.

The recorded values need no torch; the live comparison, where torch is installed, checks that the record is true.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import CASES, CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids, transformers_reference

TOLERANCE = 1e-5
"""Of the logits' range."""
NUM_GREEDY = 16
"""Tokens compared, of the 32 recorded."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {case.name: write_checkpoint(case, root / case.name) for case in CASES}


def run_layout(
    directory: Path, tp: int, pp: int, prompt: tuple[int, ...], max_tokens: int, max_model_len: int | None = None
) -> RequestOutput:
    def rank(comm: Communicator) -> RequestOutput:
        with LLM(
            directory,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            comm=comm,
            engine="numpy",
            block_size=4,
            max_model_len=max_model_len,
        ) as llm:
            params = SamplingParams(
                max_tokens=max_tokens, temperature=0.0, ignore_eos=True, prompt_logprobs=20, logprobs=20
            )
            return llm.generate([prompt], params)[0]

    outputs = run_ranks(tp * pp, rank)
    assert all(output == outputs[0] for output in outputs), "ranks disagree about the result"
    return outputs[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prompt_and_continuation_equal_transformers(case: CheckpointCase, directories: dict[str, Path]) -> None:
    reference, prompt = load_reference(case), prompt_token_ids(case)
    expected = log_softmax(reference.logits)
    tolerance = TOLERANCE * float(np.ptp(reference.logits))
    for tp, pp in case.layouts:
        output = run_layout(directories[case.name], tp, pp, prompt, NUM_GREEDY, case.max_model_len)
        assert output.token_ids == reference.greedy[:NUM_GREEDY], (tp, pp)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        for position, entry in enumerate(output.prompt_logprobs[1:], 1):
            row = expected[position - 1]
            assert entry is not None
            assert entry.token_id == prompt[position]
            assert abs(entry.logprob - row[entry.token_id]) <= tolerance, (tp, pp, position)
            ids, values = (np.array(column) for column in zip(*entry.top, strict=True))
            assert len(set(ids.tolist())) == 20
            np.testing.assert_allclose(values, row[ids], rtol=0, atol=tolerance)
            np.testing.assert_allclose(values, np.sort(row)[::-1][:20], rtol=0, atol=tolerance)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_values_are_those_of_transformers(case: CheckpointCase, tmp_path: Path) -> None:
    recorded, live = load_reference(case), transformers_reference(case, tmp_path)
    np.testing.assert_allclose(recorded.logits, live.logits, rtol=0, atol=1e-5 * float(np.ptp(live.logits)))
    assert recorded.greedy == live.greedy


@pytest.mark.parametrize("name", ["llama-grouped-heads", "gpt2-plain", "gemma-one-kv-head"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (2, 3)])
def test_greedy_tokens_found_without_gathering_logits_are_the_same(
    name: str, tp: int, pp: int, directories: dict[str, Path]
) -> None:
    reference, prompt = load_reference(CASES_BY_NAME[name]), prompt_token_ids(CASES_BY_NAME[name])

    def rank(comm: Communicator) -> RequestOutput:
        with LLM(
            directories[name], tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="numpy"
        ) as llm:
            params = SamplingParams(max_tokens=len(reference.greedy), temperature=0.0, ignore_eos=True)
            return llm.generate([prompt], params)[0]

    assert run_ranks(tp * pp, rank)[0].token_ids == reference.greedy


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_that_are_not_finite_end_the_request_with_an_error(tp: int, tmp_path: Path) -> None:
    directory = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    head = tensors["lm_head.weight"].copy()
    head[100] = np.nan  # one row, held by the last rank only
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors")

    def rank(comm: Communicator) -> RequestOutput:
        with LLM(directory, tensor_parallel_size=tp, comm=comm, engine="numpy") as llm:
            return llm.run([[3, 4]], [SamplingParams(max_tokens=4, temperature=0.0)])[0]

    output = run_ranks(tp, rank)[0]
    assert output.finish_reason == "error"
    assert output.error is not None
    assert "finite" in output.error
