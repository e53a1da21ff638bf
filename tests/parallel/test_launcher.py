"""Rank and size come from the launcher's environment, whichever launcher it is."""

from __future__ import annotations

import os

import pytest

from phalanx.parallel import mpi_comm
from phalanx.parallel.launcher import LaunchInfo, launch_info


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, LaunchInfo()),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"}, LaunchInfo(2, 4, 2, 4, "MPICH")),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5",
            },
            LaunchInfo(5, 8, 1, 4, "Open MPI"),
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}, LaunchInfo(3, 8, 3, 8, "Slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, LaunchInfo()),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, LaunchInfo()),
        ({"SLURM_STEP_ID": "batch", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, LaunchInfo()),
    ],
    ids=["by hand", "mpich", "openmpi", "srun step", "batch script, old", "shell of salloc", "batch script"],
)  # fmt: skip
def test_launch_info(environ: dict[str, str], expected: LaunchInfo) -> None:
    assert launch_info(environ) == expected


@pytest.mark.parametrize(("node", "local_size"), [("0", 4), ("1", 4), ("2", 1)])
def test_slurm_says_how_many_tasks_share_a_node(node: str, local_size: int) -> None:
    environ = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    }  # fmt: skip
    assert launch_info(environ).local_size == local_size


@pytest.mark.parametrize(("ranks", "cores", "expected"), [(4, 2, "1"), (2, 2, None), (3, None, "1")])
def test_ranks_that_outnumber_the_cores_leave_them_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, ranks: int, cores: int | None, expected: str | None
) -> None:
    names = ("MPIR_CVAR_ENABLE_HEAVY_YIELD", "OMPI_MCA_mpi_yield_when_idle")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set here does not stay
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    mpi_comm._yield_where_ranks_share_cores(LaunchInfo(0, 8, 0, ranks, "MPICH"))
    assert [os.environ.get(name) for name in names] == [expected, expected]
