"""Logits and greedy continuations of the three families equal transformers' in float32, in every layout.

The recorded values need no torch; the live comparison, where torch is installed, checks that the record is true.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import CASES, CheckpointCase, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids, transformers_reference

TOLERANCE = 2e-4
"""Of the logits' range."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {case.name: write_checkpoint(case, root / case.name) for case in CASES}


def run_layout(directory: Path, tp: int, pp: int, prompt: tuple[int, ...], max_tokens: int) -> RequestOutput:
    def rank(comm: Communicator) -> RequestOutput:
        with LLM(
            directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="numpy", block_size=4
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
        output = run_layout(directories[case.name], tp, pp, prompt, max_tokens=len(reference.greedy))
        assert output.token_ids == reference.greedy, (tp, pp)
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
