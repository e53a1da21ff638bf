"""``mpirun`` of MPICH and Open MPI alike: what it is told besides the number of ranks goes by the environment, not by flags."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["LAUNCHER_ENVIRONMENT", "ROOT", "run_module"]

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER_ENVIRONMENT: Mapping[str, str] = {
    # Open MPI refuses root, and more ranks than cores, unless told otherwise, and binds ranks to cores; 4 and 5 differ.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def run_module(num_ranks: int, module: str, *arguments: str | Path) -> list[str]:
    """Run ``python -m module`` on ranks in the checkout, for two minutes at most; its lines on standard output."""
    command = ["mpirun", "-n", str(num_ranks), sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **LAUNCHER_ENVIRONMENT}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()
