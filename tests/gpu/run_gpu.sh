#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests first, then benchmarks. Run from the repository's root:
#     tests/gpu/run_gpu.sh [--sanitize] [--no-bench]
# Results (JSON, logs) go to $OUT, by default ./gpu-results. Needs cupy, nvmath-python, pytest; torch for comparisons.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
sanitize=0 bench=1 status=0
for option in "$@"; do
    case $option in
        --sanitize) sanitize=1 ;;
        --no-bench) bench=0 ;;
        *) echo "unknown option $option; there are --sanitize and --no-bench" >&2; exit 2 ;;
    esac
done

run() {
    local name=$1
    shift
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || { status=1; echo "$name failed:"; tail -40 "$OUT/$name.log"; }
    tail -3 "$OUT/$name.log"
}

# `import launch` makes phalanx importable where it is not installed.
pytest=("$PYTHON" -c "import launch, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))" -q -p no:cacheprovider -m gpu)
run tests "${pytest[@]}" tests/kernels tests/gpu
if ((sanitize)); then
    for tool in memcheck racecheck; do
        # Failed look-ups of optional driver functions are no errors of ours.
        run "$tool" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "${pytest[@]}" -x tests/kernels
    done
fi
if ((bench)); then
    run bench_kernels "$PYTHON" tests/gpu/bench_kernels.py --json "$OUT/bench_kernels.json"
    gpus=$(nvidia-smi --list-gpus | wc -l)
    if ((gpus > 1)); then
        run bench_all_reduce mpirun --allow-run-as-root --oversubscribe -n $((gpus < 8 ? gpus : 8)) \
            "$PYTHON" tests/gpu/bench_all_reduce.py --json "$OUT/bench_all_reduce.json"
    fi
fi
exit $status
