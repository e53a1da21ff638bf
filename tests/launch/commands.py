"""Runs commands as a user types them: real processes, under mpirun where ranks matter."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python (extra [cpu])")


def command_line(command: str, *arguments: str | Path, ranks: int = 0) -> list[str]:
    """``python -m launch.<command>``, under mpirun when ``ranks`` is given."""
    words = [sys.executable, "-m", f"launch.{command}", *map(str, arguments)]
    return [str(MPIRUN), "-n", str(ranks), *words] if ranks else words


def run(
    command: str, *arguments: str | Path, ranks: int = 0, timeout: float = 60, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it in the checkout and wait."""
    return subprocess.run(
        command_line(command, *arguments, ranks=ranks),
        cwd=ROOT, env={**os.environ, **(environ or {})}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def messages(stderr: str) -> list[str]:
    """Lines of standard error that are ours, not the launcher's."""
    ours: Sequence[str] = ("phalanx", "launch.")
    return [line for line in stderr.splitlines() if line.startswith(tuple(ours))]


def processes(mark: str) -> dict[int, list[bytes]]:
    """Running processes that carry ``mark`` (``NAME=value``) in their environment, with that environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            if mark.encode() in environment:
                found[int(entry.name)] = environment
    return found


def rank_process(mark: str, rank: int) -> int:
    """The process of a rank of the job that carries ``mark``; MPICH tells it its rank."""
    found = [pid for pid, environment in processes(mark).items() if f"PMI_RANK={rank}".encode() in environment]
    assert len(found) == 1, (rank, found)
    return found[0]
