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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from phalanx.launch.commands import COMMANDS
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


@dataclass(frozen=True, slots=True)
class Job:
    """A command under way, the mark that its processes carry, and the files that take what it writes."""

    process: subprocess.Popen[bytes]
    mark: str
    num_ranks: int
    written: tuple[Path, Path]

    def ranks(self) -> list[int]:
        """The interpreters that run a command: not the launcher, its helpers or the HTTP process."""
        return [
            pid
            for pid in processes(self.mark)
            if " -m launch." in (line := command_of(pid)) and "mpirun" not in line and "http_process" not in line
        ]

    def num_with(self, library: str) -> int:
        """How many ranks have loaded ``library``."""
        return sum(library in maps(pid) for pid in self.ranks())

    def has_written(self) -> bool:
        """Whether a word has come: progress, a result, the start block."""
        return any(path.stat().st_size for path in self.written)

    def has_partial(self) -> bool:
        """Whether a directory is half written."""
        return any(self.written[0].parent.glob("*.partial"))


# A signal to a launcher that has not started its ranks yet is not one of them: MPICH's loses it, and the job runs on.
MOMENTS: dict[str, Callable[[Job], bool]] = {
    "one interpreter": lambda job: len(job.ranks()) >= 1,
    "all interpreters": lambda job: len(job.ranks()) >= job.num_ranks,
    "NumPy on one rank": lambda job: job.num_with("_multiarray_umath") >= 1,
    "NumPy on all ranks": lambda job: job.num_with("_multiarray_umath") >= job.num_ranks,
    "MPI on one rank": lambda job: job.num_with("libmpi") >= 1,
    "MPI on all ranks": lambda job: job.num_with("libmpi") >= job.num_ranks,
    "tokenizer": lambda job: job.num_with("tokenizers") >= 1,
    "first words": lambda job: job.has_written(),
    "directory": lambda job: job.has_partial(),
}
WORDS = {
    "generate": ("--prompt", "def main(", "--max-tokens", "500", "--ignore-eos", "--stream"),
    "serve": ("--port", "0"),
    "eval": ("--text", "tests/demo/held_out/modulefinder.txt"),
    "bench": ("throughput", "--num-prompts", "64", "--output-len", "128"),
    "split": ("--output", "{}/split", "--tp", "2"),
    "quantize": ("--output", "{}/quantised", "--scheme", "int8"),
    "convert": ("--from", "megatron", "--input", "{}", "--output", "{}/converted"),
    "build": ("--engine", "tensorrt", "--output", "{}/engines"),
    "check": (),
    "slurm": ("--nodes", "1", "--gpus-per-node", "2", "--gpu-memory-gib", "80"),
    "tune": (),
    "completion": ("bash",),
    "doctor": (),
    "plan": (),
}
ENDED_BY_ITSELF = {0, 2}
"""Before the signal came; 2 where the command lacks TensorRT, a GPU or a checkpoint of Megatron's."""
STATUSES = {
    number: {128 + number, number, number | signal.SIGKILL, -number}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    ("quantize", 0, "directory", signal.SIGHUP),
]


def interrupted_before_us(errors: str) -> bool:
    """Whether the interpreter itself was still starting: it then prints its own report, and no code of ours has run."""
    ours = re.findall(rf'File "{ROOT}/(?:launch/(?!__init__)|parallel|runtime|checkpoints)', errors)
    return "Fatal Python error: init" in errors or ("Traceback" in errors and not ours)


def launcher_failed(errors: str) -> bool:
    """Whether MPICH's mpirun ended by an assertion of its own: it can be surprised by a rank that goes while it handles the signal."""
    return "[mpiexec@" in errors and "assert (!closed) failed" in errors


@contextmanager
def started(command: str, ranks: int, directory: Path) -> Iterator[Job]:
    name, value = MARK, uuid.uuid4().hex
    arguments = [word.replace("{}", str(directory)) for word in WORDS[command]]
    layout = ["--pp", str(ranks)] if command in ("generate", "serve", "eval", "bench") and ranks else []
    written = directory / "output", directory / "errors"
    with written[0].open("wb") as output, written[1].open("wb") as errors:
        process = subprocess.Popen(
            command_line(command, *arguments, *layout, ranks=ranks), cwd=ROOT,
            env={**os.environ, **LAUNCHER_ENVIRONMENT, name: value}, stdout=output, stderr=errors,
        )  # fmt: skip
    mark = f"{name}={value}"
    with process:
        try:
            yield Job(process, mark, max(ranks, 1), written)
        finally:
            for pid in processes(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def assert_a_signal_ends_all(command: str, ranks: int, moment: str, number: signal.Signals, directory: Path) -> None:
    with started(command, ranks, directory) as job:
        reached = time.monotonic() + MOMENT_SECONDS
        while not MOMENTS[moment](job) and job.process.poll() is None and time.monotonic() < reached:
            continue
        job.process.send_signal(number)
        try:
            status = job.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs: {[command_of(pid) for pid in processes(job.mark)]}")
        deadline = time.monotonic() + LIMIT_SECONDS
        while job.ranks() and time.monotonic() < deadline:
            continue
        assert job.ranks() == []
        assert not job.has_partial() or ranks, "a launcher may kill the rank that would remove it"
        errors = job.written[1].read_text()
        if not interrupted_before_us(errors):
            allowed = {*ENDED_BY_ITSELF, *STATUSES[number], *([1] if ranks and is_open_mpi() else [])}
            assert status in allowed or launcher_failed(errors), errors
            assert "Traceback" not in errors


def test_every_command_is_signalled() -> None:
    assert WORDS.keys() == COMMANDS.keys()


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
@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("ranks", [0, 3])
def test_a_signal_at_any_moment_ends_every_rank_of_any_command(
    command: str, ranks: int, moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    assert_a_signal_ends_all(command, ranks, moment, number, tmp_path)
