"""Uneven heads, owned experts and a user's model file on two GPUs: transformers' recorded values in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu.test_executor_ranks import generate
from tests.models.test_against_transformers import log_softmax
from tests.support.checkpoints import ARCEE, CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.gpus import GPU_TOLERANCE, skip_without_gpus
from tests.support.reference import load_reference, prompt_token_ids

pytestmark = pytest.mark.gpu

EXPERTS = ("--expert-parallel",)


@pytest.mark.parametrize(
    ("case", "flags"),
    [
        (CASES_BY_NAME["falcon-one-norm"], ()),  # three key/value heads
        (CASES_BY_NAME["qwen2_moe-one-dense-layer"], ()),
        (CASES_BY_NAME["qwen2_moe-one-dense-layer"], EXPERTS),
        (CASES_BY_NAME["mixtral-plain"], EXPERTS),  # five experts
        (ARCEE, ("--model-file", str(ARCEE.model_file))),
    ],
    ids=["uneven", "split", "owned", "owned-unevenly", "model-file"],
)
def test_two_ranks_equal_transformers(case: CheckpointCase, flags: tuple[str, ...], tmp_path: Path) -> None:
    skip_without_gpus(2)
    reference, prompt = load_reference(case), prompt_token_ids(case)
    options = ("--max-tokens", str(len(reference.greedy)), "--temperature", "0", "--prompt-logprobs", "0", *flags)
    (line,) = generate(write_checkpoint(case, tmp_path), 2, 1, [prompt], *options)
    assert tuple(line["token_ids"]) == reference.greedy
    expected = log_softmax(reference.logits)[np.arange(len(prompt) - 1), prompt[1:]]
    measured = [entry["logprob"] for entry in line["prompt_logprobs"][1:]]
    np.testing.assert_allclose(measured, expected, rtol=0, atol=GPU_TOLERANCE * float(np.ptp(reference.logits)))
