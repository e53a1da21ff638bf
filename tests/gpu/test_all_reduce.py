"""Our all-reduce between GPUs: sums, replays in a graph, lost peers, and that every process ends."""

from __future__ import annotations

import pytest

from tests.support.gpus import num_gpus, skip_without_gpus
from tests.support.launcher import run_module

pytestmark = pytest.mark.gpu


def run_checks(num_ranks: int, *checks: str) -> None:
    passed = run_module(num_ranks, "tests.gpu.all_reduce_ranks", *checks)
    assert passed == [f"{check}: {num_ranks} ranks passed" for check in checks]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_sums_and_replays_are_exact_and_every_process_ends(num_ranks: int) -> None:
    skip_without_gpus(num_ranks)
    run_checks(num_ranks, "own", "group")


@pytest.mark.parametrize("num_ranks", [3, 4, 8])
def test_more_ranks_than_gpus_get_the_same_sums(num_ranks: int) -> None:
    if not 2 <= num_gpus() < num_ranks:
        pytest.skip(f"needs 2 to {num_ranks - 1} GPUs")
    run_checks(num_ranks, "shared")


def test_a_peer_that_does_not_come_ends_the_wait_and_the_processes() -> None:
    skip_without_gpus(2)
    run_checks(2, "lost_peer")
