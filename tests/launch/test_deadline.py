"""A failing assertion on one rank fails the whole mpirun of pytest; the other ranks do not wait for it for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

FAILING = """
import pytest
from phalanx.parallel.mpi_comm import world_communicator

@pytest.mark.mpi
def test_fails_on_one_rank():
    world = world_communicator()
    assert world.rank != 1, "only rank 1 fails"
    world.barrier()
"""


def test_a_failure_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "test_one_rank.py").write_text(FAILING)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    options = ["-q", "-p", "no:cacheprovider", "--with-mpi", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    command = ["mpirun", "-n", "3", sys.executable, "-m", "pytest", *options, str(tmp_path)]
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "rank 1: test_one_rank.py::test_fails_on_one_rank failed" in result.stderr
    assert "only rank 1 fails" in result.stderr
