"""``launch.split`` as typed: alone and under mpirun, and what a careless user gets."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")


def run(*arguments: str | Path, ranks: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.split", *map(str, arguments)]
    if ranks:
        command = [str(MPIRUN), "-n", str(ranks), *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python (extra [cpu])")
def test_ranks_share_the_work_and_write_the_same_files(model: Path, tmp_path: Path) -> None:
    assert run("--model", model, "--output", tmp_path / "alone", "--tp", "2", "--pp", "3").returncode == 0
    result = run("--model", model, "--output", tmp_path / "shared", "--tp", "2", "--pp", "3", ranks=4)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    names = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "shared").iterdir())
    assert len(names) == 8
    equal, _, _ = filecmp.cmpfiles(tmp_path / "alone", tmp_path / "shared", names, shallow=False)
    assert sorted(equal) == names


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python (extra [cpu])")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tp", "7"], "6 query heads cannot be shared by tp_size=7"),
        (["--pp", "4"], "num_layers=3 cannot fill pp_size=4"),
        (["--model", "/nowhere"], "two models"),
        (["--bogus"], "--bogus"),
    ],
)
def test_mistake_under_mpirun_is_one_line_and_ends_all_ranks(
    arguments: list[str], expected: str, model: Path, tmp_path: Path
) -> None:
    result = run("--model", model, "--output", tmp_path / "s", *arguments, ranks=3)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith(("phalanx", "launch.split"))]
    assert len(lines) == 1
    assert expected in lines[0]
    assert not list(tmp_path.glob("s*"))


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python (extra [cpu])")
def test_existing_output_under_mpirun_does_not_hang(model: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    result = run("--model", model, "--output", tmp_path / "s", ranks=3)
    assert result.returncode == 2
    assert result.stderr.count("exists; remove it") == 1


def test_works_from_any_directory_on_relative_paths(model: Path, tmp_path: Path) -> None:
    result = run("--model", "model", "--output", "s", "--tp", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--output"),
        (["--output", "s", "--tp", "0"], "tensor-parallel-size=0 is below 1"),
        (["--output", "s", "--tp", "x"], "invalid int value"),
        (["--output", "s", "--dtype", "int8"], "int8"),
        (["--output", "s", "--model", "config.json"], "is a file"),
        (["--output", "/proc/nowhere/s"], "cannot write"),
    ],
)
def test_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, model: Path) -> None:
    result = run(*(["--model", "."] if "--model" not in arguments else []), *arguments, cwd=model)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


def test_help_is_quick_and_needs_nothing_heavy() -> None:
    program = "import sys, launch.split\ntry:\n    launch.split.main(['--help'])\nexcept SystemExit as exit_:\n    "
    program += "print(exit_.code, [name for name in ('numpy', 'mpi4py', 'cupy') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 []"


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python (extra [cpu])")
def test_split_again_and_again_it_says_the_same_token_for_token(tmp_path: Path) -> None:
    """The demo checkpoint, 4x1 -> 2x2 -> 1x3, loaded at 2x2, against the same without any split on one rank."""
    before: list[str | Path] = []
    for tp, pp in ((4, 1), (2, 2), (1, 3)):
        output = tmp_path / f"{tp}x{pp}"
        assert run(*before, "--output", output, "--tp", str(tp), "--pp", str(pp)).returncode == 0
        before = ["--model", output]
    prompts = ["--prompt", "def main(", "--prompt", "import os", "--max-tokens", "24", "--json"]
    generate = [sys.executable, "-m", "launch.generate", *prompts]
    layout = ["--model", str(tmp_path / "1x3"), "--tp", "2", "--pp", "2"]
    commands = ([*generate, "--engine", "numpy"], [str(MPIRUN), "-n", "4", *generate, "--engine", "numpy", *layout])
    one, four = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
        for command in commands
    )
    assert one == four
    assert one.count('"token_ids"') == 2
