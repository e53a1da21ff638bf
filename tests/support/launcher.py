"""What ``mpirun`` is told besides the number of ranks, for MPICH and Open MPI alike: by the environment, not by flags."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LAUNCHER_ENVIRONMENT"]

LAUNCHER_ENVIRONMENT: Mapping[str, str] = {
    # Open MPI refuses root, and more ranks than cores, unless told otherwise, and binds ranks to cores; 4 and 5 differ.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
