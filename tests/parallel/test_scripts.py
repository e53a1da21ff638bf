"""Scripts around `LLM` in which one rank does something else: the job ends with a report instead of a hang."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.checkpoints.config_files import demo_path
from tests.server.jobs import ENVIRONMENT, mpirun

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import launch\nfrom phalanx import LLM\nllm = LLM(tensor_parallel_size=2)\n"


def run_script(tmp_path: Path, body: str) -> tuple[int, str]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + body)
    return run(script)


def run(script: Path) -> tuple[int, str]:
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


@pytest.mark.parametrize(
    ("difference", "named"),
    [("block_size", "block_size (8 and 16)"), ("weights", "the weights ("), ("config", "config.json (")],
)
def test_ranks_that_differ_are_named_in_one_line(tmp_path: Path, difference: str, named: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo_path(), other)
    if difference == "weights":
        data = bytearray((other / "model-00002-of-00002.safetensors").read_bytes())
        (header,) = struct.unpack("<Q", data[:8])
        data[8 + header :] = bytes(len(data) - 8 - header)
        (other / "model-00002-of-00002.safetensors").write_bytes(data)
    if difference == "config":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    script = tmp_path / "script.py"
    script.write_text(
        "import launch\n"
        "from phalanx import LLM\n"
        "from phalanx.launch.running import run_command\n"
        "from phalanx.parallel.launcher import launch_info\n"
        "def main(argv=None):\n"
        f"    odd = {{'block_size': 8}} if {difference == 'block_size'} and launch_info().rank else {{}}\n"
        f"    LLM({str(other)!r} if launch_info().rank else None, tensor_parallel_size=2, **odd).close()\n"
        "run_command(main)\n"
    )
    status, errors = run(script)
    assert status == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("phalanx: ")]
    assert "rank 1 on " in line
    assert named in line
