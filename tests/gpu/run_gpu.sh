#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests, sanitizers, commands, benchmarks. From anywhere:
#     tests/gpu/run_gpu.sh [STEP...]
# Without steps all are run, in this order; with several GPUs tests and benchmarks use them.
#     tests       operations, executor, layouts, serving over HTTP, against float64, the NumPy engine and transformers
#     soak        10,000 mixed requests
#     doctor      what works here, on one rank for each GPU
#     tune        timing of one model's matrix products
#     memcheck    compute-sanitizer on the kernel tests: addresses
#     racecheck   compute-sanitizer on the kernel tests: shared memory
#     ready       launch.serve with Llama-3-8B's sizes: seconds to READY (writes 16 GB below $TMPDIR)
#     fp8         launch.bench of fp8 weights, activations and cache beside bfloat16; decode attention over fp8 pages; products of 8-bit codes and fp8 blocks
#     trace       a timeline for Perfetto
#     allreduce   our all-reduce and NCCL's
#     kernels     benchmarks of kernels
#     models      benchmarks of models, medians of three
#     serving     Gemma 2B's sizes served to 64, 1,024 and 3,000 streams beside offline; with several GPUs two replicas beside one
# Logs and JSON go to $OUT, by default ./gpu-results; exit status 1 if a step failed. Needs phalanx-llm[cuda13,test]; torch and
# transformers for their comparisons.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
STEPS=(tests soak doctor tune memcheck racecheck ready trace allreduce kernels models serving fp8)
mkdir -p "$OUT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Open MPI refuses root unless told otherwise; MPICH ignores these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
status=0

run() { # name command...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || { status=1; echo "$name failed:"; tail -40 "$OUT/$name.log"; }
    tail -3 "$OUT/$name.log"
    echo "-- $((SECONDS - start)) s"
}

on_all_gpus() { # command...
    local gpus
    gpus=$(nvidia-smi --list-gpus | wc -l)
    if ((gpus > 1)); then
        mpirun -n "$gpus" "$@"
    else
        "$@"
    fi
}

# `import launch` makes phalanx importable where it is not installed.
pytest=("$PYTHON" -c "import launch, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))" -q --tb=short)

sanitize() { # tool
    # Failed look-ups of optional driver functions are no errors of ours.
    run "$1" compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 "${pytest[@]}" -x -m gpu tests/kernels tests/gpu/test_gemm8_tiles.py
}

for step in "${@:-${STEPS[@]}}"; do
    case $step in
        tests) run tests "${pytest[@]}" -m gpu tests/kernels tests/gpu tests/server/test_serve_on_gpu.py ;;
        soak) run soak "${pytest[@]}" -m slow tests/gpu/test_soak.py ;;
        doctor) run doctor on_all_gpus "$PYTHON" -m launch.doctor ;;
        tune) run tune "$PYTHON" -m launch.tune --model tests/gpu/models/gemma-2b --tokens 1,64,1024 --again ;;
        memcheck | racecheck) sanitize "$step" ;;
        ready)
            run ready "$PYTHON" -m tests.gpu.measure_ready tests/gpu/models/llama-3-8b \
                --directory "${TMPDIR:-/tmp}/phalanx-llama-3-8b" --json "$OUT/ready.json"
            ;;
        trace)
            run trace on_all_gpus "$PYTHON" -m launch.bench throughput --model tests/gpu/models/gemma-2b --load-format dummy \
                --engine cuda --num-prompts 256 --output-len 32 --max-num-seqs 128 --trace "$OUT/timeline.json"
            ;;
        fp8)
            run attention_fp8 "$PYTHON" tests/gpu/bench_attention.py fp8
            run bench_codes "$PYTHON" tests/gpu/bench_codes.py --json "$OUT/bench_codes.json"
            run bench_blocks "$PYTHON" tests/gpu/bench_blocks.py --json "$OUT/bench_blocks.json"
            run models_fp8 "$PYTHON" -m tests.gpu.bench_models --out "$OUT" gemma-2b-fp8 gemma-2b gemma-7b-fp8 gemma-7b \
                llama-3-8b-fp8 llama-3-8b llama-3-8b-2048-fp8 llama-3-8b-2048 llama-3-8b-one-fp8 llama-3-8b-one \
                qwen3-8b-blocks qwen3-8b
            ;;
        allreduce) run allreduce on_all_gpus "$PYTHON" tests/gpu/bench_all_reduce.py --json "$OUT/all_reduce.json" ;;
        kernels)
            run bench_kernels "$PYTHON" tests/gpu/bench_kernels.py --json "$OUT/bench_kernels.json"
            run bench_experts "$PYTHON" tests/gpu/bench_experts.py --json "$OUT/bench_experts.json"
            ;;
        models) run models "$PYTHON" -m tests.gpu.bench_models --out "$OUT" ;;
        serving)
            run serving "$PYTHON" -m tests.gpu.bench_serving --out "$OUT"
            (($(nvidia-smi --list-gpus | wc -l) < 2)) || run replicas "$PYTHON" -m tests.gpu.bench_replicas --out "$OUT"
            ;;
        *) echo "unknown step $step; there are ${STEPS[*]}" >&2; exit 2 ;;
    esac
done
exit $status
