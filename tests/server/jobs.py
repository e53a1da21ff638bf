"""Whole ``mpirun ... launch.serve`` jobs, and which processes belong to one."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import Server, start

MARK = "PHALANX_TEST_JOB"


class Job:
    """A server made of several processes, all of which carry the job's mark in their environment."""

    def __init__(self, server: Server, mark: str) -> None:
        self.server = server
        self._mark = f"{MARK}={mark}".encode()

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        return self._find(f"PMI_RANK={rank}".encode(), b"launch.serve")

    def http_process(self) -> int:
        """Process id of the HTTP process."""
        return self._find(self._mark, b"launch.http_process")

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

    def _find(self, variable: bytes, command: bytes) -> int:
        found = [
            pid
            for pid, (environment, line) in self.processes().items()
            if variable in environment and command in line and b"mpirun" not in line and b"hydra" not in line
        ]
        assert len(found) == 1, (variable, command, found)
        return found[0]


@contextlib.contextmanager
def serve(num_ranks: int, *flags: str, wait_for: str = "READY") -> Iterator[Job]:
    """``mpirun -n num_ranks python -m launch.serve flags`` on any free port; without mpirun for 0 ranks."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "launch.serve", "--port", "0", *flags]
    if num_ranks:
        mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if mpirun is None:
            pytest.skip("no mpirun here")
        command = [mpirun, "-n", str(num_ranks), *command]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with start(command, **{MARK: mark}, **threads) as server:
        job = Job(server, mark)
        if wait_for:
            server.wait_for(wait_for)
        yield job
    job.seconds_until_gone()
