#!/bin/bash
# Correctness and throughput of the CUDA executor on one GPU: tests/gpu/run_executor.sh [tests] [bench cases...]
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 PHALANX_CACHE_DIR=${PHALANX_CACHE_DIR:-/tmp/phalanx-cache}
out=${OUT:-/tmp/phalanx-out}
mkdir -p "$out" "$PHALANX_CACHE_DIR"

bench() {  # name model mode input output prompts seqs tokens [flags...]
    local name=$1 model=$2 mode=$3 input=$4 output=$5 prompts=$6 seqs=$7 tokens=$8
    shift 8
    echo "== $name"
    timeout 240 python3 -m launch.bench "$mode" --model "tests/gpu/models/$model" --load-format dummy --engine cuda \
        --input-len "$input" --output-len "$output" --num-prompts "$prompts" --max-num-seqs "$seqs" \
        --max-num-batched-tokens "$tokens" --json "$out/$name.json" "$@" >"$out/$name.log" 2>&1
    local status=$?
    python3 - "$out/$name.json" "$out/$name.log" $status <<'PY'
import json, sys
path, log, status = sys.argv[1:]
try:
    r = json.load(open(path))
    keys = ("output_tokens_per_second", "steady_output_tokens_per_second", "mean_step_ms", "seconds", "gpu_idle_fraction", "kv_blocks")
    print("  ".join(f"{key}={r[key]:.4g}" if isinstance(r[key], float) else f"{key}={r[key]}" for key in keys),
          "tpot", r["time_per_output_token_ms"], "ttft", r["time_to_first_token_ms"])
except Exception:
    print("status", status)
    print(open(log).read()[-1200:])
PY
}

for step in "$@"; do
    case $step in
    tests) timeout 300 python3 -c 'import sys, launch, pytest; sys.exit(pytest.main(sys.argv[1:]))' -q -x -p no:cacheprovider tests/gpu/test_executor.py 2>&1 | tail -40 ;;
    gemma-2b) bench gemma-2b gemma-2b throughput 128 128 8192 1024 2048 ;;
    gemma-2b-short) bench gemma-2b-short gemma-2b throughput 128 128 2048 1024 2048 ;;
    gemma-7b) bench gemma-7b gemma-7b throughput 128 128 2048 512 2048 ;;
    llama-3-8b) bench llama-3-8b llama-3-8b throughput 128 128 4096 1024 2048 ;;
    llama-3-8b-short) bench llama-3-8b-short llama-3-8b throughput 128 128 2048 1024 2048 ;;
    llama-3-8b-long) bench llama-3-8b-long llama-3-8b throughput 2048 128 256 256 8192 ;;
    llama-3-8b-one) bench llama-3-8b-one llama-3-8b latency 128 128 3 1 2048 ;;
    gemma-2b-one) bench gemma-2b-one gemma-2b latency 128 128 3 1 2048 ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
    esac
done
