"""Whole ``mpirun ... launch.serve`` jobs, and which processes belong to one."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.launcher import LAUNCHER_ENVIRONMENT

from .servers import Server, start

MARK = "PHALANX_TEST_JOB"


ENVIRONMENT = {**LAUNCHER_ENVIRONMENT, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def mpirun() -> str:
    """The launcher of this environment; the test is skipped where there is none."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("no mpirun here")
    return found


@functools.cache
def is_open_mpi() -> bool:
    """Whether it is Open MPI's, which ends the ranks half a second after a SIGTERM or Ctrl-C, drained or not."""
    version = subprocess.run([mpirun(), "--version"], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    return "Open MPI" in version.stdout


class Job:
    """A server made of several processes, all of which carry the job's mark in their environment."""

    def __init__(self, server: Server, mark: str, num_ranks: int) -> None:
        self.server = server
        self.num_ranks = num_ranks
        self._mark = f"{MARK}={mark}".encode()

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        name = b"OMPI_COMM_WORLD_RANK" if is_open_mpi() else b"PMI_RANK"
        return self._find(b"%s=%d" % (name, rank), b"launch.serve")

    def http_process(self) -> int:
        """Process id of an HTTP process."""
        return self.http_processes()[0]

    def http_processes(self) -> list[int]:
        """Process ids of all HTTP processes."""
        return self._find_all(self._mark, b"launch.http_process")

    def processes(self) -> dict[int, tuple[list[bytes], bytes]]:
        """Environment and command line of every process of the job that still runs."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                if self._mark in environment:
                    found[int(entry.name)] = environment, (entry / "cmdline").read_bytes()
        return found

    def seconds_until_gone(self, limit: float = 30.0) -> float:
        """How long some process of the job still runs."""
        started = time.monotonic()
        while self.processes():
            assert time.monotonic() < started + limit, [line for _, line in self.processes().values()]
        return time.monotonic() - started

    def seconds_until_only_the_launcher_runs(self, limit: float = 10.0) -> float:
        """How long some rank or HTTP process of the job still runs."""
        started = time.monotonic()
        while left := [
            pid for module in (b"launch.serve", b"launch.http_process") for pid in self._find_all(self._mark, module)
        ]:
            assert time.monotonic() < started + limit, left
        return time.monotonic() - started

    def _find(self, variable: bytes, command: bytes) -> int:
        found = self._find_all(variable, command)
        assert len(found) == 1, (variable, command, found)
        return found[0]

    def _find_all(self, variable: bytes, command: bytes) -> list[int]:
        return [
            pid
            for pid, (environment, line) in self.processes().items()
            if variable in environment
            and command in line
            and b"mpirun" not in line
            and b"hydra" not in line
            and b"prte" not in line
        ]


@contextlib.contextmanager
def serve(
    num_ranks: int,
    *flags: str,
    wait_for: str = "READY",
    launcher_flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
    program: Sequence[str | Path] = ("-m", "launch.serve"),
) -> Iterator[Job]:
    """``prefix mpirun -n num_ranks python program flags`` on any free port; without mpirun for 0 ranks."""
    mark = uuid.uuid4().hex
    command = [sys.executable, *map(str, program), "--port", "0", *flags]
    if num_ranks:
        command = [*prefix, mpirun(), *launcher_flags, "-n", str(num_ranks), *command]
    with start(command, **{MARK: mark}, **ENVIRONMENT) as server:
        job = Job(server, mark, num_ranks)
        if wait_for:
            server.wait_for(wait_for)
        yield job
    job.seconds_until_gone()
