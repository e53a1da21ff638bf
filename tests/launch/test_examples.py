"""The examples run as they are."""

from __future__ import annotations

import subprocess
import sys

from .commands import MPIRUN, ROOT, needs_mpirun


def run_example(*launcher: str) -> subprocess.CompletedProcess[str]:
    command = [*launcher, sys.executable, "examples/offline.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@needs_mpirun
def test_offline_prints_once_and_the_same_on_any_number_of_ranks() -> None:
    alone, ranks = run_example(), run_example(str(MPIRUN), "-n", "2")
    assert (alone.returncode, alone.stderr, ranks.returncode, ranks.stderr) == (0, "", 0, "")
    assert alone.stdout == ranks.stdout
    assert alone.stdout.count("--- ") == 3
    assert alone.stdout.startswith("--- ")
