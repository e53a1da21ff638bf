#!/usr/bin/env bash
# Everything that must pass, in the order in which it fails fastest. Run it from an environment with the extras [cpu,test].
# Every step runs, whatever failed before; the last lines say which did, and pytest's say what was skipped and whether that is expected.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
failed=()

step() {
    printf '\n== %s\n' "$1"
    "${@:2}" || failed+=("$1")
}

step "formatting" ruff format --check .
step "lint" ruff check .
step "types" mypy
step "import contracts" env PYTHONPATH=tools/tree lint-imports
# A test process for each core, four at most: every second test waits for commands that it has started.
step "tests without ranks" python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
for ranks in 2 3 4 8; do
    step "tests under mpirun, $ranks ranks" tests/run_mpi.sh "$ranks"
done

if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[@]}"
    exit 1
fi
printf '\nAll steps passed. Tests that were skipped are listed at the end of each step, with what runs them.\n'
