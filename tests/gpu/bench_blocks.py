"""Products of fp8 blocks on one GPU: codes by codes, values of codes by unpacked values, and beside them fp8 with a scale a row, and bfloat16.

    python tests/gpu/bench_blocks.py [--json FILE] [--tokens 72,128,1024]

Products are tuned and timed as `gemm_tuner.py` does it; what makes their inputs is timed apart and added.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import cupy

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.product_sizes import BLOCK, packed_row_bytes, padded_tokens
from phalanx.kernels.quantize import CodeRule, QuantizedRows, quantize_rows
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_groups
from phalanx.kernels.round_inputs import InputRule, round_inputs
from phalanx.kernels.tuning import GemmTimings
from phalanx.parallel.errors import ExecutorError
from tests.gpu.bench_kernels import Bench

SHAPES = {  # rows, columns
    "Qwen3-8B qkv": (6144, 4096),
    "Qwen3-8B o": (4096, 4096),
    "Qwen3-8B gate_up": (24576, 4096),
    "Qwen3-8B down": (4096, 12288),
    "Llama-3-8B gate_up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
}
TOKENS = "72,128,256,512,1024,2048,8192"


def problems_of(t: int, rows: int, columns: int) -> dict[str, GemmProblem]:
    blocks = GemmProblem(padded_tokens(t), rows, packed_row_bytes(columns, "fp8"), "fp8", "bfloat16", has_blocks=True)
    return {
        "codes": blocks,
        "values": GemmProblem(t, rows, columns, "bfloat16", "bfloat16", packed=f"fp8/{BLOCK}"),
        "rows": GemmProblem(t, rows, columns, "fp8", "bfloat16"),
        "bfloat16": GemmProblem(t, rows, columns, "bfloat16", "bfloat16"),
    }


def input_times(bench: Bench, t: int, columns: int) -> dict[str, float]:
    """Microseconds of the kernels that make inputs ``[t, columns]``."""
    x, out = bench.normal(t, columns), bench.normal(t, columns)
    codes = cupy.empty((padded_tokens(t), packed_row_bytes(columns, "fp8")), np.uint8)
    groups = QuantizedGroups(codes, cupy.empty((-(-columns // BLOCK), padded_tokens(t)), np.float32))
    of_rows = QuantizedRows(cupy.empty((t, columns), np.uint8), cupy.empty(t, np.float32), "fp8")
    library = bench.library
    calls: dict[str, Callable[[int], None]] = {
        "codes": lambda _: quantize_groups(library, x, groups),
        "values": lambda _: round_inputs(library, x, out, InputRule(CodeRule("fp8"), BLOCK)),
        "rows": lambda _: quantize_rows(library, x, of_rows),
    }
    return {name: bench.microseconds(call, 3 * t * columns) for name, call in calls.items()} | {"bfloat16": 0.0}


def measured(bench: Bench, tuner: GemmTuner, t: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Microseconds of product and inputs by each kind; None where cuBLASLt has no algorithm."""
    inputs, products = input_times(bench, t, shape[1]), {}
    for name, problem in problems_of(t, *shape).items():
        try:
            (choice,) = tuner.tune([problem]).values()
        except ExecutorError as error:
            print(error)
            products[name] = None
            continue
        products[name] = choice.microseconds
        cupy.get_default_memory_pool().free_all_blocks()
    return {"products": products, "inputs": inputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default=TOKENS)
    options = parser.parse_args()
    bench, timings, report = Bench(), GemmTimings(None), []
    gemm = Gemm(bench.library, CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), timings)
    tuner = GemmTuner(gemm, timings)
    for name, shape in SHAPES.items():
        for t in map(int, options.tokens.split(",")):
            times = measured(bench, tuner, t, shape)
            report.append({"product": name, "shape": [t, *shape], **times})
            print(
                f"{name:18} T={t:5} " + "; ".join(line(t, shape, kind, times) for kind in times["inputs"]), flush=True
            )
    gemm.close()
    if options.json:
        options.json.write_text(json.dumps(report))


def line(t: int, shape: tuple[int, int], kind: str, times: dict[str, Any]) -> str:
    product, inputs = times["products"][kind], times["inputs"][kind]
    if product is None:
        return f"{kind} -"
    return f"{kind} {product:.1f} + {inputs:.1f} us ({2e-6 * t * shape[0] * shape[1] / product:.0f} TFLOP/s)"


if __name__ == "__main__":
    main()
