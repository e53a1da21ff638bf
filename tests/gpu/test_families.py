"""Every family on the CUDA executor: against transformers on the same GPU, alone and over two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.llm import LLM
from tests.gpu.test_executor_ranks import DEEP, generate
from tests.models.test_against_transformers import log_softmax
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.gpus import GPU_TOLERANCE, skip_without_gpus
from tests.support.reference import Reference, prompt_token_ids, transformers_reference

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

LAYOUTS = [(1, 1), (2, 1), (1, 2)]
FAMILIES = [
    case for case in CASES_BY_NAME.values() if case.dtype == "float32" and case.config.get("model_type") not in DEEP
]
"""The families of `DEEP` are in `test_executor_ranks`, with more layouts."""


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda case: case.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointCase:
    case: CheckpointCase = request.param
    directory = write_checkpoint(case, tmp_path_factory.getbasetemp() / case.name)
    skip_without_gpus(1)
    try:
        LLM(directory, engine="cuda", num_kv_blocks=8).close()
    except ConfigError as error:
        if "the cuda engine cannot run" not in str(error):
            raise
        pytest.skip(f"refused by name: {error}")
    return case


@pytest.fixture(scope="module")
def directory(family: CheckpointCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / family.name


@pytest.fixture(scope="module")
def transformers_values(family: CheckpointCase, directory: Path) -> Reference:
    return transformers_reference(family, directory, device="cuda")


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_families_equal_transformers_on_the_gpu(
    family: CheckpointCase, directory: Path, transformers_values: Reference, tp: int, pp: int
) -> None:
    skip_without_gpus(tp * pp)
    prompt = prompt_token_ids(family)
    flags = ("--max-tokens", str(len(transformers_values.greedy)), "--temperature", "0", "--prompt-logprobs", "0")
    length = () if family.max_model_len is None else ("--max-model-len", str(family.max_model_len))
    (line,) = generate(directory, tp, pp, [prompt], *flags, *length)
    assert tuple(line["token_ids"]) == transformers_values.greedy
    expected = log_softmax(transformers_values.logits)[np.arange(len(prompt) - 1), prompt[1:]]
    measured = [entry["logprob"] for entry in line["prompt_logprobs"][1:]]
    tolerance = GPU_TOLERANCE * float(np.ptp(transformers_values.logits))
    np.testing.assert_allclose(measured, expected, rtol=0, atol=tolerance)
