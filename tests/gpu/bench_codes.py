"""Products of 8-bit codes with a scale for each row on one GPU: cuBLASLt's algorithms and our own kernels, each kind's best.

    python tests/gpu/bench_codes.py [--json FILE] [--tokens 64,256,2048]

Timed as `gemm_tuner.py` does it; cuBLASLt's int8 includes our kernel for the scales.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import cupy

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.tuning import GemmChoice, GemmTimings

SHAPES = {  # rows, columns
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B gate_up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Gemma 2B gate_up": (32768, 2048),
}
TOKENS = "1,32,64,128,256,512,1024,2048,16384"


def best_times(gemm: Gemm, tuner: GemmTuner, problem: GemmProblem) -> dict[str, float]:
    """Microseconds by kind of kernel."""
    timed, best = tuner.timed_operands(problem), {}
    for kernel in gemm.candidates(problem):
        kind = type(kernel).__name__
        best[kind] = min(best.get(kind, float("inf")), tuner.measure(problem, GemmChoice(kernel), timed))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default=TOKENS)
    options = parser.parse_args()
    timings, report = GemmTimings(None), []
    gemm = Gemm(KernelLibrary(), CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), timings)
    tuner = GemmTuner(gemm, timings)
    for name, (rows, columns) in SHAPES.items():
        for kind in ("int8", "fp8"):
            for tokens in map(int, options.tokens.split(",")):
                times = best_times(gemm, tuner, GemmProblem(tokens, rows, columns, kind, "bfloat16"))
                report.append({"product": name, "kind": kind, "shape": [tokens, rows, columns], "microseconds": times})
                rate = 2e-6 * tokens * rows * columns / min(times.values())
                words = ", ".join(f"{kernel} {time:.1f}" for kernel, time in times.items())
                print(f"{name:18} {kind:4} T={tokens:5} {words} us; best {rate:.0f} TOPS", flush=True)
                cupy.get_default_memory_pool().free_all_blocks()
    gemm.close()
    if options.json:
        options.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
