"""The LM head of Baichuan 2, whose rows are divided by their lengths when they are loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.runtime.models import baichuan
from tests.checkpoints.splitting import read_all, split
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

from .test_against_transformers import log_softmax, run_layout

CASE = CASES_BY_NAME["baichuan-7b"]


@pytest.fixture(autouse=True)
def the_vocabulary_means_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baichuan, "VOCAB_SIZE_OF_2", CASE.config["vocab_size"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(CASE, tmp_path / "model")


@pytest.mark.parametrize(("name", "tp", "pp"), [("baichuan-7b", 1, 1), ("baichuan-7b", 2, 2), ("baichuan-13b", 2, 1)])
def test_logits_are_those_of_the_rows_directions(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    case = CASES_BY_NAME[name]
    directory = write_checkpoint(case, tmp_path)
    lengths = np.linalg.norm(load_file(directory / "model.safetensors")["lm_head.weight"].astype(np.float64), axis=1)
    expected = log_softmax(load_reference(case).logits / lengths)
    output = run_layout(directory, tp, pp, prompt_token_ids(case), max_tokens=1)
    assert output.prompt_logprobs is not None
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert abs(entry.logprob - expected[position, entry.token_id]) < 1e-5 * np.ptp(expected)


def test_a_split_holds_the_rows_as_they_are_stored(directory: Path, tmp_path: Path) -> None:
    split(directory, tmp_path / "split", 2, 1)
    stored = load_file(directory / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(read_all(tmp_path / "split")["lm_head.weight"], stored)
    output, whole = (
        run_layout(path, 2, 1, prompt_token_ids(CASE), max_tokens=4) for path in (tmp_path / "split", directory)
    )
    assert output == whole
