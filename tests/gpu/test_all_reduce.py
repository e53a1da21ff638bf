"""Our all-reduce between GPUs: sums, replays in a graph, lost peers, and that every process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launcher import LAUNCHER_ENVIRONMENT

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


def num_gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def run_checks(num_ranks: int, *checks: str) -> None:
    command = ["mpirun", "-n", str(num_ranks), sys.executable, "-m"]
    result = subprocess.run(
        [*command, "tests.gpu.all_reduce_ranks", *checks],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **LAUNCHER_ENVIRONMENT}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [f"{check}: {num_ranks} ranks passed" for check in checks]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_sums_and_replays_are_exact_and_every_process_ends(num_ranks: int) -> None:
    if num_ranks > num_gpus():
        pytest.skip(f"needs {num_ranks} GPUs")
    run_checks(num_ranks, "own", "group")


@pytest.mark.parametrize("num_ranks", [3, 4, 8])
def test_more_ranks_than_gpus_get_the_same_sums(num_ranks: int) -> None:
    if not 2 <= num_gpus() < num_ranks:
        pytest.skip(f"needs 2 to {num_ranks - 1} GPUs")
    run_checks(num_ranks, "shared")


def test_a_peer_that_does_not_come_ends_the_wait_and_the_processes() -> None:
    if num_gpus() < 2:
        pytest.skip("needs 2 GPUs")
    run_checks(2, "lost_peer")
