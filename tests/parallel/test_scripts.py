"""Scripts around `LLM` in which one rank does something else: the job ends with a report instead of a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.jobs import ENVIRONMENT, mpirun

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import launch\nfrom phalanx import LLM\nllm = LLM(tensor_parallel_size=2)\n"


def run_script(tmp_path: Path, body: str) -> tuple[int, str]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + body)
    done = subprocess.run(
        [mpirun(), "-n", "2", sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_the_script(tmp_path: Path, rank: int) -> None:
    body = f"if llm._replica.world.rank == {rank}:\n    raise ArithmeticError('planted')\nllm.generate(['a'])\n"
    status, errors = run_script(tmp_path, body)
    assert status != 0
    assert "ArithmeticError: planted" in errors


def test_a_leader_that_generates_alone_is_told_that_the_other_rank_left(tmp_path: Path) -> None:
    status, errors = run_script(tmp_path, "if llm.is_leader:\n    llm.generate(['a'])\n")
    assert status != 0
    assert "phalanx: rank 1 (" in errors
    assert "has left while rank 0 is generating" in errors


def test_a_script_that_forgets_to_close_ends_well(tmp_path: Path) -> None:
    status, errors = run_script(tmp_path, "llm.generate(['a'])\n")
    assert (status, errors) == (0, "")
