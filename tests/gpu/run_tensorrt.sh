#!/usr/bin/env bash
# The whole check of the TensorRT engine, on a machine with a GPU that the installed TensorRT supports. From anywhere:
#     tests/gpu/run_tensorrt.sh [--model DIR]
# Needs phalanx-llm[cuda13] and [tensorrt] or [tensorrt-rtx], pytest, and mpirun for more than one GPU; or, with TensorRT 8.6, the
# folder that tools/portable_tensorrt.py makes:
#     FOLDER/run tests/gpu/run_tensorrt.sh
# With 8.6 it runs segments (tests/tensorrt/test_segments_on_gpu.py), serving, and benchmarks next to the CUDA engine; with other
# releases whole networks (tests/tensorrt/test_on_gpu.py). A --model (Hugging Face directory) adds a build, text and a benchmark of
# a real checkpoint on all GPUs. Logs go to $OUT, by default ./tensorrt-results. What was run where: docs/tensorrt.md.
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
# Open MPI refuses root unless told otherwise; MPICH ignores these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

run() { # name command...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || { status=1; echo "$name failed:"; tail -40 "$OUT/$name.log"; }
    tail -3 "$OUT/$name.log"
    echo "-- $((SECONDS - start)) s"
}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if ((gpus == 0)); then
    echo "no NVIDIA GPU here; the parts that need none are in tests/tensorrt (python -m pytest tests/tensorrt)" >&2
    exit 2
fi
# `import launch` makes phalanx importable where it is not installed.
pytest=("$PYTHON" -c "import launch, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))" -q -p no:cacheprovider)
segments=$("$PYTHON" -c "import launch; from phalanx.runtime.executors.tensorrt.installed import load_tensorrt as load; print(load().computes_segments)")
if [[ $segments == True ]]; then
    on_gpu=tests/tensorrt/test_segments_on_gpu.py
    sizes=(--dtype float16 --max-num-seqs 16 --max-num-batched-tokens 512)
else
    on_gpu=tests/tensorrt/test_on_gpu.py
    sizes=(--max-num-seqs 16)
fi

run doctor "$PYTHON" -m launch.doctor
run networks "${pytest[@]}" tests/tensorrt
run one_gpu "${pytest[@]}" -m gpu "$on_gpu"
for ranks in 2 4; do
    if ((gpus >= ranks)); then
        run "${ranks}_gpus" mpirun -n "$ranks" "${pytest[@]}" -m gpu "$on_gpu"
    fi
done
run serve env GPU_TEST_ENGINE=tensorrt "${pytest[@]}" -m gpu tests/server/test_serve_on_gpu.py
run demo_build "$PYTHON" -m launch.build --output "$OUT/demo" "${sizes[@]}"
run demo_generate "$PYTHON" -m launch.generate --engine tensorrt --engine-dir "$OUT/demo" "${sizes[@]}" \
    --prompt "def main(" --max-tokens 40
for engine in numpy tensorrt; do # the same loss from both
    run "demo_eval_$engine" "$PYTHON" -m launch.eval --engine "$engine" "${sizes[@]}" --text tests/demo/held_out/modulefinder.txt
done

bench() { # name mode engine model options...
    local name=$1 mode=$2 engine=$3 model=$4
    shift 4
    run "bench_${name}_$engine" "$PYTHON" -m launch.bench "$mode" --engine "$engine" --model "tests/gpu/models/$model" \
        --load-format dummy --dtype float16 --input-len 128 --output-len 128 --max-num-batched-tokens 2048 \
        --json "$OUT/${name}_$engine.json" "$@"
}

if [[ $segments == True ]]; then
    for model in llama-3-8b gemma-2b; do
        run "build_$model" "$PYTHON" -m launch.build --model "tests/gpu/models/$model" --load-format dummy --dtype float16 \
            --max-num-seqs 256 --max-num-batched-tokens 2048 --output "$OUT/$model"
        run "segments_$model" "$PYTHON" -m tests.gpu.bench_segments "$OUT/$model" "tests/gpu/models/$model"
        cat "$OUT/segments_$model.log"
        for engine in tensorrt cuda; do
            engines=()
            [[ $engine == tensorrt ]] && engines=(--engine-dir "$OUT/$model")
            bench "$model" throughput "$engine" "$model" --max-num-seqs 256 --num-prompts 768 "${engines[@]}"
            bench "$model-one" latency "$engine" "$model" --max-num-seqs 1 --num-prompts 2 "${engines[@]}"
        done
    done
fi
if [[ -n $MODEL ]]; then
    sizes=(--max-num-seqs 64 --max-num-batched-tokens 2048)
    run model_build "$PYTHON" -m launch.build --model "$MODEL" --tp "$gpus" --output "$OUT/model" "${sizes[@]}"
    run model_generate mpirun -n "$gpus" "$PYTHON" -m launch.generate --engine tensorrt --model "$MODEL" --tp "$gpus" \
        --engine-dir "$OUT/model" "${sizes[@]}" --prompt "The capital of France is" --max-tokens 32
    run model_bench mpirun -n "$gpus" "$PYTHON" -m launch.bench throughput --engine tensorrt --model "$MODEL" --tp "$gpus" \
        --engine-dir "$OUT/model" "${sizes[@]}" --input-len 128 --output-len 128 --num-prompts 256 --json "$OUT/bench.json"
fi
exit $status
