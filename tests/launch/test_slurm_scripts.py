"""The batch scripts: valid shell, flags that exist, and what they do where ``srun`` is a stand-in that starts one rank.

`tests/slurm` runs them under a real Slurm.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import ROOT, run

SLURM = ROOT / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
RENDERED = "launch.slurm"
FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$SRUN_LOG"; shift; done
exec "$@"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one task: a stand-in for srun, the example's settings with this machine's values."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(FAKE_SRUN)
    srun.chmod(0o755)
    (tmp_path / "keys").write_text("key\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n{"prompt": "Hello"}\n')
    example = (SLURM / "settings.example.sh").read_text()
    settings = tmp_path / "settings.sh"
    settings.write_text(
        re.sub(r"^source .*$", "", example, flags=re.MULTILINE)
        + f"MODEL={ROOT}/checkpoints/demo\nAPI_KEY_FILE={tmp_path}/keys\nGENERATE_OPTIONS=(--max-tokens 3 --ignore-eos)\n"
    )
    path = f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_SUBMIT_DIR": str(tmp_path), "PHALANX_SETTINGS": str(settings), "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1",
    }  # fmt: skip


def commands(script: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands of ``launch`` in a script, with their flags."""
    text = script.read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"python -m launch\.(\w+)(.*)", text):
        yield command, re.findall(r"(?<=\s)--[a-z-]+", rest)


def find_script(name: str, command: str, directory: Path) -> str:
    """The path of a script of the repository, or of one that ``launch.slurm`` writes for a job of one rank."""
    if name != RENDERED:
        return str(SLURM / f"{name}.sbatch")
    path = directory / "rendered.sbatch"
    path.write_text(run("slurm", "--run", command, "--gpus-per-node", "1").stdout)
    return str(path)


def directives(script: Path) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE))


def test_there_are_scripts() -> None:
    assert {script.name for script in SCRIPTS} == {
        "doctor.sbatch", "generate.sbatch", "serve-multi-node.sbatch", "serve-one-node.sbatch",
    }  # fmt: skip


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM / "settings.example.sh"], ids=lambda path: path.name)
def test_is_valid_shell(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_exist_and_resources_follow_the_rules(script: Path) -> None:
    found = list(commands(script))
    assert len(found) == 1
    for command, flags in found:
        parser = importlib.import_module(f"phalanx.launch.{command}").build_parser()
        known = {flag for action in parser._actions for flag in action.option_strings}
        assert set(flags) <= known
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert not re.search(r"gpus-per-task|gpu-bind|NODELIST|MASTER_ADDR", text)
    assert any(line.startswith("--gpus-per-node=") for line in directives(script))


@pytest.mark.parametrize("name", ["serve-one-node", "serve-multi-node"])
def test_servers_are_warned_before_the_end_and_come_back_after_a_failure(name: str) -> None:
    wanted = {"--signal=USR1@120", "--requeue", "--open-mode=append", "--output=%x-%j.out"}
    assert wanted <= directives(SLURM / f"{name}.sbatch")


def test_every_setting_of_the_example_is_used_and_every_one_used_is_in_the_example() -> None:
    example = (SLURM / "settings.example.sh").read_text()
    given = set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
    scripts = "".join(script.read_text() for script in SCRIPTS)
    used = {name for name in re.findall(r"\$\{?([A-Z_]+)", scripts) if not name.startswith(("SLURM_", "PHALANX_"))}
    assert used == given


@pytest.mark.parametrize("name", ["generate", RENDERED])
def test_generate_leaves_whole_results(name: str, job: dict[str, str], tmp_path: Path) -> None:
    script = [find_script(name, "generate", tmp_path)]
    result = subprocess.run(
        ["bash", *script], env=job, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "results-4711.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["token_ids"]) for line in lines] == [3, 3]
    assert not (tmp_path / "results-4711.jsonl.partial").exists()
    options = (tmp_path / "srun.log").read_text().split()
    assert {"--mpi=pmix", "--kill-on-bad-exit=1"} <= set(options)


def test_generate_goes_on_where_an_earlier_run_was_ended(job: dict[str, str], tmp_path: Path) -> None:
    script = ["bash", str(SLURM / "generate.sbatch")]
    first = {**job, "SLURM_JOB_ID": "4710"}
    subprocess.run(script, env=first, cwd="/", capture_output=True, timeout=60, check=True)
    whole = (tmp_path / "results-4710.jsonl").read_text()
    partial = tmp_path / "results-4711.jsonl.partial"
    partial.write_text(whole.splitlines(keepends=True)[1] + '{"index": 0, "prom')
    subprocess.run(script, env=job, cwd="/", capture_output=True, timeout=60, check=True)
    assert (tmp_path / "results-4711.jsonl").read_text() == whole


def test_generate_that_fails_leaves_no_results(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("no JSON\n")
    script = [str(SLURM / "generate.sbatch")]
    result = subprocess.run(
        ["bash", *script], env=job, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert not (tmp_path / "results-4711.jsonl").exists()


@pytest.mark.parametrize("name", ["serve-one-node", "serve-multi-node", RENDERED])
def test_servers_say_where_they_are_and_drain(name: str, job: dict[str, str], tmp_path: Path) -> None:
    endpoint = tmp_path / "endpoint-4711.json"
    process = subprocess.Popen(
        ["bash", find_script(name, "serve", tmp_path)], env=job, cwd="/", stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("READY"))
        found = json.loads(endpoint.read_text())
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0
    assert ready.startswith("READY http://0.0.0.0:")
    assert found["url"] == f"http://{found['host']}:{found['port']}"
    assert found["host"] not in ("0.0.0.0", "127.0.0.1")
    assert (found["port"], found["model"]) == (int(ready.rsplit(":", 1)[1]), "demo")
    assert not endpoint.exists()


def test_doctor_looks_at_the_allocation(job: dict[str, str]) -> None:
    script = [str(SLURM / "doctor.sbatch")]
    result = subprocess.run(
        ["bash", *script], env=job, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "job 4711" in result.stdout
