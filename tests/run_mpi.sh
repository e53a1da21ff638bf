#!/usr/bin/env bash
# The tests marked mpi on N ranks: tests/run_mpi.sh N. A failure on one rank ends all; the deadline catches a hang.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:?usage: tests/run_mpi.sh RANKS}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Open MPI's launcher refuses root and more ranks than cores unless told otherwise; MPICH ignores these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
# Rank 0 reports for all; a failure on another rank is written to standard error by tests/conftest.py.
# shellcheck disable=SC2016 # expanded by each rank's shell
rank='[[ ${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}} = 0 ]] || exec > /dev/null; exec "$@"'
timeout --kill-after=10 600 mpirun -n "$ranks" bash -c "$rank" rank \
    python -m pytest -q -p no:cacheprovider --with-mpi --only-mpi tests/mpi
