"""Signals at every moment of a command's life: all ranks end, the status is a documented one, and there is no traceback.

Moments are not seconds: the job is watched until it has come as far as the moment says. The whole product of commands, moments and
signals is marked slow; a sample of it runs always. What is run is the launcher of this environment, so CI runs this file twice.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.jobs import is_open_mpi
from tests.support.launcher import LAUNCHER_ENVIRONMENT

from .commands import ROOT, command_line, needs_mpirun, processes

MARK = "PHALANX_SIGNALLED_JOB"
MOMENT_SECONDS = 5.0
"""A moment that does not come (one process never loads MPI) becomes this one."""
LIMIT_SECONDS = 60.0
"""A job that takes longer to end than this is called a hang."""


def maps(process: int) -> str:
    try:
        return Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return ""


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def ranks_of(mark: str) -> list[int]:
    """The interpreters that run a command: not the launcher, its helpers or the HTTP process."""
    return [
        pid
        for pid in processes(mark)
        if " -m launch." in (line := command_of(pid)) and "mpirun" not in line and "http_process" not in line
    ]


# A signal to a launcher that has not started its ranks yet is not one of them: MPICH's loses it, and the job runs on.
MOMENTS: dict[str, Callable[[str, int], bool]] = {
    "one interpreter": lambda mark, ranks: len(ranks_of(mark)) >= 1,
    "all interpreters": lambda mark, ranks: len(ranks_of(mark)) >= ranks,
    "NumPy on one rank": lambda mark, ranks: any("_multiarray_umath" in maps(pid) for pid in ranks_of(mark)),
    "NumPy on all ranks": lambda mark, ranks: sum("_multiarray_umath" in maps(pid) for pid in ranks_of(mark)) >= ranks,
    "MPI on one rank": lambda mark, ranks: any("libmpi" in maps(pid) for pid in ranks_of(mark)),
    "MPI on all ranks": lambda mark, ranks: sum("libmpi" in maps(pid) for pid in ranks_of(mark)) >= ranks,
    "tokenizer": lambda mark, ranks: any("tokenizers" in maps(pid) for pid in ranks_of(mark)),
}
COMMANDS = {
    "generate": ("--prompt", "def main(", "--max-tokens", "500", "--ignore-eos", "--stream"),
    "serve": ("--port", "0"),
    "eval": ("--text", "tests/demo/held_out/modulefinder.txt"),
    "bench": ("throughput", "--num-prompts", "64", "--output-len", "128"),
    "split": ("--output", "{}/split", "--tp", "2"),
    "doctor": (),
    "plan": (),
}
STATUSES = {
    number: {128 + number, number, number | signal.SIGKILL, -number} for number in (signal.SIGINT, signal.SIGTERM)
}
"""128 + the signal. Before MPI is up, MPICH's mpirun reports the bare number, combined with that of the kill that ended the other
ranks; Open MPI's reports 1 for a job that it ended itself; a process that no launcher started dies of the signal."""
SAMPLE = [
    ("serve", 3, "one interpreter", signal.SIGINT),
    ("serve", 3, "MPI on one rank", signal.SIGINT),
    ("serve", 3, "NumPy on all ranks", signal.SIGINT),
    ("generate", 3, "one interpreter", signal.SIGINT),
    ("generate", 3, "tokenizer", signal.SIGTERM),
    ("generate", 0, "one interpreter", signal.SIGINT),
    ("generate", 0, "NumPy on all ranks", signal.SIGINT),
]


def interrupted_before_us(errors: str) -> bool:
    """Whether the interpreter itself was still starting: it then prints its own report, and no code of ours has run."""
    ours = re.findall(rf'File "{ROOT}/(?:launch/(?!__init__)|parallel|runtime|checkpoints)', errors)
    return "Fatal Python error: init" in errors or ("Traceback" in errors and not ours)


@contextmanager
def job(command: str, ranks: int, directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    name, value = MARK, uuid.uuid4().hex
    arguments = [word.replace("{}", str(directory)) for word in COMMANDS[command]]
    layout = ["--pp", str(ranks)] if command in ("generate", "serve", "eval", "bench") and ranks else []
    process = subprocess.Popen(
        command_line(command, *arguments, *layout, ranks=ranks), cwd=ROOT, text=True,
        env={**os.environ, **LAUNCHER_ENVIRONMENT, name: value}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    mark = f"{name}={value}"
    try:
        with process:
            yield process, mark
    finally:
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)


def assert_a_signal_ends_all(command: str, ranks: int, moment: str, number: signal.Signals, directory: Path) -> None:
    with job(command, ranks, directory) as (process, mark):
        reached = time.monotonic() + MOMENT_SECONDS
        while not MOMENTS[moment](mark, max(ranks, 1)) and process.poll() is None and time.monotonic() < reached:
            continue
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs: {[command_of(pid) for pid in processes(mark)]}")
        deadline = time.monotonic() + LIMIT_SECONDS
        while ranks_of(mark) and time.monotonic() < deadline:
            continue
        assert ranks_of(mark) == []
        if not interrupted_before_us(errors):
            assert process.returncode in {0, *STATUSES[number], *([1] if ranks and is_open_mpi() else [])}, errors
            assert "Traceback" not in errors


@needs_mpirun
@pytest.mark.parametrize(("command", "ranks", "moment", "number"), SAMPLE)
def test_a_signal_ends_every_rank(
    command: str, ranks: int, moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    assert_a_signal_ends_all(command, ranks, moment, number, tmp_path)


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("ranks", [0, 3])
def test_a_signal_at_any_moment_ends_every_rank_of_any_command(
    command: str, ranks: int, moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    assert_a_signal_ends_all(command, ranks, moment, number, tmp_path)
