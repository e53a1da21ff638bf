"""``launch.slurm``: what was asked for lands in the script, the script is valid shell, and a job that could not start is refused."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.launch.slurm import main
from phalanx.parallel.errors import CheckpointError, ConfigError

from .test_plan import LLAMA_3_8B

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
FOREIGN_TO_SHELLCHECK = "SC1090,SC2154"
"""The settings file is known at run time only, and with it LAUNCHER."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "a model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return directory


def script(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(list(map(str, words))) == 0
    return capsys.readouterr().out


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH (--[a-z-]+)=?(.*)$", text, re.MULTILINE))


def words_of(text: str) -> list[str]:
    """The words of the array ``command``, settings unexpanded."""
    return shlex.split(text[text.index("command=(") + 9 : text.index("\n)\n")], comments=True)


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_is_valid_shell_with_flags_that_exist(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(capsys, model, "--run", command, "--nodes=2", "--gpus-per-node=8", "--max-num-seqs=8")
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    checks = [["bash", "-n"], *([[str(SHELLCHECK), "-e", FOREIGN_TO_SHELLCHECK]] if SHELLCHECK.exists() else [])]
    for check in checks:
        result = subprocess.run([*check, str(path)], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    known = importlib.import_module(f"phalanx.launch.{command}").build_parser().flags()
    assert {word for word in words_of(text) if word.startswith("--")} <= set(known)
    assert not re.search(r"gpus-per-task|gpu-bind|NODELIST|MASTER_ADDR", text)


def test_every_line_for_slurm_and_the_command_has_its_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = script(capsys, model, "--gpus-per-node=8").splitlines()
    for reason, line in zip(lines, lines[1:], strict=False):
        if line.startswith(("#SBATCH", "    --", '    "', "set ", "source ", "exec ")):
            assert re.match(r" *# ", reason), line


def test_options_land_where_they_belong(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(
        capsys, "--model", model, "--nodes=2", "--gpus-per-node=8", "--cpus-per-task=6", "--time=1-12", "--quantize=fp8",
        "--max-model-len", "4096", "--no-prefix-caching", "--gpu-memory-gib=80",
    )  # fmt: skip
    asked = directives(text)
    expected = {
        "--nodes": "2", "--ntasks-per-node": "8", "--gpus-per-node": "8", "--cpus-per-task": "6", "--time": "1-12",
        "--signal": "USR1@120", "--requeue": "", "--open-mode": "append", "--mem": "0",
    }  # fmt: skip
    assert expected.items() <= asked.items()
    words = words_of(text)
    assert words[:5] == ["python", "-m", "launch.serve", "--model", str(model)]
    assert words[5:11] == ["--dp", "1", "--pp", "2", "--tp", "8"]
    assert "$SHARED_DIR/endpoint-$SLURM_JOB_ID.json" in words
    given = words[words.index("${SERVE_OPTIONS[@]}") + 1 :]
    assert sorted(given) == sorted(["--quantize", "fp8", "--max-model-len", "4096", "--no-prefix-caching"])
    assert "tp 8 = 16 GPU(s); room for" in text


def test_a_default_that_is_given_wins_over_the_sites_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``SERVE_OPTIONS=(--quantize fp8)`` in the settings would count otherwise."""
    words = words_of(script(capsys, "--model", model, "--gpus-per-node=8", "--quantize", "none", "--dtype=auto"))
    given = words[words.index("${SERVE_OPTIONS[@]}") + 1 :]
    assert sorted(given) == sorted(["--quantize", "none", "--dtype", "auto"])


def test_generate_resumes_and_is_renamed_when_complete(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, model, "--run=generate", "--gpus-per-node=4")
    assert (directives(text)["--signal"], directives(text)["--time"]) == ("USR1@60", "02:00:00")
    expected = ["--input-file", "$PROMPTS", "--output", "$results.partial", "--resume", "${GENERATE_OPTIONS[@]}"]
    assert words_of(text)[-6:] == expected
    assert text.endswith('mv "$results.partial" "$results"\n')


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("--nodes 1 --gpus-per-node 8", (1, 1, 8)),
        ("--nodes 2 --gpus-per-node 8", (1, 2, 8)),
        ("--nodes 2 --gpus-per-node 8 --dp 2", (2, 1, 8)),
        ("--nodes 2 --gpus-per-node 8 --dp 4", (4, 1, 4)),
        ("--nodes 1 --gpus-per-node 8 --pp 2", (1, 2, 4)),
        ("--nodes 2 --gpus-per-node 8 --tp 4", (1, 4, 4)),
        ("--nodes 2 --gpus-per-node 8 --tp 16", (1, 1, 16)),
        ("--nodes 3 --gpus-per-node 4 --dp 3 --pp 2 --tp 2", (3, 2, 2)),
    ],
)
def test_sizes_left_out_keep_tensor_parallel_groups_inside_a_node(
    words: str, layout: tuple[int, int, int], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = words_of(script(capsys, model, *words.split()))
    assert tuple(int(found[found.index(flag) + 1]) for flag in ("--dp", "--pp", "--tp")) == layout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpus-per-node 8,4", "'8,4' is unequal nodes, but every node runs as many ranks as the others"),
        ("--gpus-per-node many", "'many' is not a number of GPUs"),
        ("--gpus-per-node 0", "--gpus-per-node=0 is below 1"),
        ("--gpus-per-node 8 --nodes 0", "--nodes=0 is below 1"),
        ("--gpus-per-node 8 --cpus-per-task 0", "--cpus-per-task=0 is below 1"),
        ("--gpus-per-node 8 --pp 0", "pipeline-parallel-size=0 is below 1"),
        ("--gpus-per-node 8 --dp 3", "dp=3 x pp=1 x tp=2 is 6 rank(s), but --nodes=1 x --gpus-per-node=8 is 8"),
        ("--gpus-per-node 8 --nodes 2 --tp 8 --pp 1", "is 8 rank(s), but --nodes=2 x --gpus-per-node=8 is 16"),
        ("--gpus-per-node 3 --nodes 2 --tp 2", "tp=2 does not divide --gpus-per-node=3"),
        ("--gpus-per-node 8 --nodes 5 --tp 40", "32 query heads cannot be shared by tp_size=40"),
        ("--gpus-per-node 1 --nodes 33 --tp 1", "num_layers=32"),
        (
            "--gpus-per-node 1 --gpu-memory-gib 16",
            "one sequence of 8192 tokens needs GPUs of 19.7 GiB, --gpu-memory-gib=16",
        ),
        ("--gpus-per-node 1 --max-model-len 9000", "8192 positions"),
        ("--gpus-per-node 1 --time soon", "--time=soon is not a time of Slurm"),
    ],
)
def test_a_job_that_could_not_start_is_refused(words: str, said: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        main(["--model", str(model), *words.split()])
    assert "\n" not in str(raised.value)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        main(["--model", str(tmp_path), "--gpus-per-node=1"])


def test_a_line_break_in_a_path_stays_a_comment_and_one_word(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = model.rename(tmp_path / "two\nexit 9")
    text = script(capsys, odd, "--gpus-per-node=1")
    assert "--model" in words_of(text)
    assert str(odd) in words_of(text)
    assert all(line.startswith("#") for line in text[: text.index("set -euo")].splitlines() if line)
