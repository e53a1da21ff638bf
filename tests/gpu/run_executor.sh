#!/bin/bash
# Correctness and throughput of the CUDA executor: tests/gpu/run_executor.sh [tests] [ranks] [case...]
# Cases are named model-input-output, -one for one request at a time, with -tpNppM for several GPUs.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 PHALANX_CACHE_DIR=${PHALANX_CACHE_DIR:-/tmp/phalanx-cache}
out=${OUT:-/tmp/phalanx-out}
mkdir -p "$out" "$PHALANX_CACHE_DIR"

bench() {  # name model mode input output prompts seqs tokens [flags...]
    local name=$1 model=$2 mode=$3 input=$4 output=$5 prompts=$6 seqs=$7 tokens=$8 ranks=${RANKS:-1}
    shift 8
    local start=(python3)
    ((ranks > 1)) && start=(mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$ranks" python3)
    echo "== $name"
    timeout 240 "${start[@]}" -m launch.bench "$mode" --model "tests/gpu/models/$model" --load-format dummy --engine cuda \
        --input-len "$input" --output-len "$output" --num-prompts "$prompts" --max-num-seqs "$seqs" \
        --max-num-batched-tokens "$tokens" --json "$out/$name.json" "$@" >"$out/$name.log" 2>&1
    python3 - "$out/$name.json" "$out/$name.log" $? <<'PY'
import json, sys
path, log, status = sys.argv[1:]
try:
    result = json.load(open(path))
    keys = ("output_tokens_per_second", "steady_output_tokens_per_second", "mean_step_ms", "seconds", "gpu_idle_fraction", "kv_blocks")
    print("  ".join(f"{key}={result[key]:.5g}" for key in keys),
          "tpot_ms %.4f" % result["time_per_output_token_ms"]["p50"], "ttft_ms %.2f" % result["time_to_first_token_ms"]["p50"])
except Exception:
    print("status", status)
    print(open(log).read()[-1500:])
PY
}

layout() {  # model step: sets tp, pp and RANKS from model-tpNppM
    local sizes=${2#"$1-tp"}
    tp=${sizes%pp*} pp=${sizes#*pp}
    RANKS=$((tp * pp))
}

tests() {
    timeout 300 python3 -c 'import sys, launch, pytest; sys.exit(pytest.main(sys.argv[1:]))' \
        -q -p no:cacheprovider --tb=short "$@" 2>&1 | tail -30
}

for step in "$@"; do
    case $step in
    tests) tests tests/gpu/test_executor.py ;;
    ranks) tests tests/gpu/test_executor_ranks.py ;;
    soak) tests -m slow tests/gpu/test_soak.py ;;
    gemma-2b) bench $step gemma-2b throughput 128 128 8192 1024 2048 ;;
    gemma-2b-short) bench $step gemma-2b throughput 128 128 2048 1024 2048 ;;
    gemma-2b-one) bench $step gemma-2b latency 128 128 3 1 2048 ;;
    gemma-7b) bench $step gemma-7b throughput 128 128 2048 1024 2048 ;;
    llama-3-8b) bench $step llama-3-8b throughput 128 128 4096 1024 2048 ;;
    llama-3-8b-short) bench $step llama-3-8b throughput 128 128 2048 1024 2048 ;;
    llama-3-8b-2048) bench $step llama-3-8b throughput 2048 128 256 256 8192 ;;
    llama-3-8b-one) bench $step llama-3-8b latency 128 128 3 1 2048 ;;
    trace) bench $step gemma-2b throughput 128 32 1024 512 2048 --trace "$out/timeline.json" ;;
    trace-pp2) RANKS=2 bench $step llama-3-8b throughput 128 32 512 256 2048 --pp 2 --tp 1 --trace "$out/timeline.json" ;;
    llama-2-70b-*-one) layout llama-2-70b ${step%-one}; bench $step llama-2-70b latency 128 128 2 1 2048 --tp $tp --pp $pp ;;
    llama-2-70b-*) layout llama-2-70b $step; bench $step llama-2-70b throughput 128 128 "${PROMPTS:-2048}" 1024 2048 --tp $tp --pp $pp ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
    esac
done
