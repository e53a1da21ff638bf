"""``launch.check`` and ``--model-file`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import ARCEE, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

from .commands import messages, needs_mpirun, run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(ARCEE, tmp_path_factory.mktemp("arcee"))


@needs_mpirun
def test_a_model_file_runs_on_two_by_two_ranks(directory: Path) -> None:
    assert ARCEE.model_file is not None
    prompt = ",".join(map(str, prompt_token_ids(ARCEE)))
    result = run(
        "generate", directory, "--model-file", ARCEE.model_file, "--tp", "2", "--pp", "2", "--prompt-token-ids", prompt,
        "--max-tokens", "12", "--temperature", "0", "--ignore-eos", "--json", "--engine", "numpy", ranks=4,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert tuple(json.loads(result.stdout)["token_ids"]) == load_reference(ARCEE).greedy[:12]
    assert "ArceeForCausalLM is defined by --model-file" in result.stderr


def test_a_mistake_is_one_line_and_exit_status_2(directory: Path, tmp_path: Path) -> None:
    assert ARCEE.model_file is not None
    wrong = tmp_path / "wrong.py"
    wrong.write_text(ARCEE.model_file.read_text().replace("blocks.mlp(ops, name, x,", "ops.activation(x,"))
    result = run("check", directory, "--model-file", wrong)
    assert (result.returncode, result.stdout) == (2, "")
    assert messages(result.stderr) == ["phalanx: ArceeForCausalLM: layers.0.up.weight is declared but not used"]


def test_without_its_file_the_checkpoint_is_refused(directory: Path) -> None:
    result = run("check", directory)
    assert result.returncode == 2
    assert "architectures=['ArceeForCausalLM'] in config.json is not supported" in result.stderr
