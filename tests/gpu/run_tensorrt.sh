#!/usr/bin/env bash
# The whole check of the TensorRT engine, on a machine with a GPU that the installed TensorRT supports. From anywhere:
#     tests/gpu/run_tensorrt.sh [--model DIR]
# Needs phalanx-llm[cuda13] and [tensorrt] or [tensorrt-rtx], pytest, and mpirun for more than one GPU. A --model (Hugging Face
# directory) adds a build, an evaluation and a benchmark of a real checkpoint on all GPUs. Logs go to $OUT, by default
# ./tensorrt-results. This script has been read and its CPU parts run; it has not run on a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-tensorrt-results}
PYTHON=${PYTHON:-python3}
MODEL=
status=0
while (($#)); do
    case $1 in
        --model) MODEL=$2; shift 2 ;;
        *) echo "unknown option $1; there is --model DIR" >&2; exit 2 ;;
    esac
done
mkdir -p "$OUT"
export PHALANX_CACHE_DIR=${PHALANX_CACHE_DIR:-$PWD/$OUT/cache}

run() {
    local name=$1
    shift
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || { status=1; echo "$name failed:"; tail -40 "$OUT/$name.log"; }
    tail -3 "$OUT/$name.log"
}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if ((gpus == 0)); then
    echo "no NVIDIA GPU here; the parts that need none are in tests/tensorrt (python -m pytest tests/tensorrt)" >&2
    exit 2
fi
# `import launch` makes phalanx importable where it is not installed.
pytest=("$PYTHON" -c "import launch, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))" -q -p no:cacheprovider)

run doctor "$PYTHON" -m launch.doctor
run networks "${pytest[@]}" tests/tensorrt
run one_gpu "${pytest[@]}" -m gpu tests/tensorrt/test_on_gpu.py
if ((gpus > 1)); then
    run two_gpus mpirun -n 2 "${pytest[@]}" -m gpu tests/tensorrt/test_on_gpu.py
fi
run demo_build "$PYTHON" -m launch.build --output "$OUT/demo" --max-num-seqs 16
run demo_generate "$PYTHON" -m launch.generate --engine tensorrt --engine-dir "$OUT/demo" --max-num-seqs 16 \
    --prompt "def main(" --max-tokens 40
for engine in numpy tensorrt; do # the same loss from both
    run "demo_eval_$engine" "$PYTHON" -m launch.eval --engine "$engine" --max-num-seqs 16 \
        --text tests/demo/held_out/modulefinder.txt
done
if [[ -n $MODEL ]]; then
    run model_build "$PYTHON" -m launch.build --model "$MODEL" --tp "$gpus" --output "$OUT/model" --max-num-seqs 64
    run model_generate mpirun -n "$gpus" "$PYTHON" -m launch.generate --engine tensorrt --model "$MODEL" --tp "$gpus" \
        --engine-dir "$OUT/model" --prompt "The capital of France is" --max-tokens 32
    run model_bench mpirun -n "$gpus" "$PYTHON" -m launch.bench throughput --engine tensorrt --model "$MODEL" --tp "$gpus" \
        --engine-dir "$OUT/model" --input-len 128 --output-len 128 --num-prompts 256 --max-num-seqs 64 --json "$OUT/bench.json"
fi
exit $status
