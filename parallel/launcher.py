# SPDX-License-Identifier: Apache-2.0
"""What the launcher (mpirun, srun) says about this process, read from the environment without touching MPI."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

__all__ = ["RANK_VARIABLES", "LaunchInfo", "forget_launcher", "launch_info"]

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_SLURM_RUN = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, slots=True)
class LaunchInfo:
    """Rank and size as the launcher set them; a process started by hand is rank 0 of 1, ``launcher`` None."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str | None = None


def launch_info(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read the variables of Open MPI, MPICH (Hydra), PMIx and Slurm.

    Slurm's variables are also set in a batch script and in the shell of ``salloc``, so they count only inside a step.
    """
    if not _is_in_slurm_step(environ):
        environ = {key: value for key, value in environ.items() if not key.startswith("SLURM_")}
    launcher = next((name for name in RANK_VARIABLES if name in environ), None)
    if launcher is None:
        return LaunchInfo()
    size = _first(environ, _SIZE, 1)
    local_size = _first(environ, _LOCAL_SIZE, _slurm_local_size(environ) or size)
    return LaunchInfo(
        rank=_first(environ, RANK_VARIABLES, 0),
        size=size,
        local_rank=_first(environ, _LOCAL_RANK, 0),
        local_size=local_size,
        launcher={"OMPI": "Open MPI", "PMI_": "MPICH", "PMIX": "PMIx", "SLUR": "Slurm"}[launcher[:4]],
    )


def forget_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """From now on this process is a rank of one: it neither waits for others nor ends them."""
    for name in (*RANK_VARIABLES, "SLURM_STEP_ID"):
        environ.pop(name, None)


def _is_in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this: the numbers of batch scripts and interactive shells begin at 0xfffffff0 (slurm.h)."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node, from Slurm's run lengths: ``4(x2),1`` is 4 on two nodes and 1 on the next."""
    counts: list[int] = []
    for run in _SLURM_RUN.findall(environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(run[0])] * int(run[1] or 1)
    node = _first(environ, ("SLURM_NODEID",), 0)
    return counts[node] if node < len(counts) else None


def _first(environ: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), default)
