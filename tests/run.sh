#!/usr/bin/env bash
# Everything that must pass, in the order in which it fails fastest. Run it from an environment with the extras [cpu,test].
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

step() { printf '\n== %s\n' "$*"; }

step "formatting and lint"
ruff format --check .
ruff check .
step "types"
mypy
step "import contracts"
PYTHONPATH=tools/tree lint-imports
step "tests, one process"
python -m pytest -q
for ranks in 2 3 4 8; do
    step "tests under mpirun, $ranks ranks"
    tests/run_mpi.sh "$ranks"
done
