"""Speed of a mixture of experts on one GPU: bytes of the chosen experts' weights, or arithmetic, in a second.

    python tests/gpu/bench_experts.py [--formats bfloat16 fp8 ...] [--models "Mixtral 8x7B" ...] [--tokens 1 16 ...] [--json FILE]

Every figure is the median of replays of a CUDA graph that holds a layer's whole mixture (routing, both products, sum), over copies
of the weights that together exceed the second-level cache. Routers are random, so experts get about equal shares. Bytes of codes count
scales, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.arrays import ceil_div
from phalanx.kernels.experts import ExpertRows, Routing, combine, grouped_product, route
from phalanx.kernels.packed import PackedWeight, parse_layout
from phalanx.kernels.product_sizes import packed_row_bytes
from tests.gpu.bench_kernels import BFLOAT16, Bench, copies_for

MODELS = {  # hidden, feed-forward, experts, chosen: of one rank
    "Mixtral 8x7B": (4096, 14336, 8, 2),
    "Mixtral 8x7B/2": (4096, 7168, 8, 2),
    "Qwen3 30B-A3B": (2048, 768, 128, 8),
}
FORMATS = {  # as `PackedWeight.layout`
    "bfloat16": "", "fp8": "fp8/0", "fp8 blocks": "fp8/128", "int8": "int8/0", "int4": "int4/128", "int4 with zeros": "int4/128z",
}  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)


def stack(bench: Bench, layout: str, rows: int, columns: int) -> Any:
    """The matrices of experts, of random bits."""
    if not layout:
        return bench.normal(rows, columns)
    kind, group, has_zero = parse_layout(layout)
    groups = ceil_div(columns, group) if group else 1
    codes = bench.normal(rows, packed_row_bytes(columns, kind) // 2)
    return PackedWeight(
        cupy.ndarray((rows, 2 * codes.shape[1]), np.uint8, memptr=codes.data), cupy.full((groups, rows), 1e-3, np.float32),
        cupy.zeros((groups, rows), np.int8) if has_zero else None, kind, columns, group,
    )  # fmt: skip


def stack_bytes(weight: Any) -> int:
    """Of all matrices and scales."""
    if not isinstance(weight, PackedWeight):
        return int(weight.nbytes)
    return sum(one.nbytes for one in (weight.codes, weight.scale, weight.zero) if one is not None)


def measure(bench: Bench, model: str, scheme: str, num_tokens: int) -> dict[str, object]:
    hidden_size, features, num_experts, top_k = MODELS[model]
    routing = Routing(num_experts, top_k, True, range(num_experts))

    def layer() -> tuple[Any, Any]:
        layout = FORMATS[scheme]
        return (
            stack(bench, layout, num_experts * 2 * features, hidden_size),
            stack(bench, layout, num_experts * hidden_size, features),
        )

    weights = [layer()]
    expert_bytes = sum(map(stack_bytes, weights[0])) / num_experts
    weights += [layer() for _ in range(copies_for(expert_bytes * num_experts) - 1)]
    noise = np.random.default_rng(3).standard_normal((num_experts + num_tokens, hidden_size)).astype(BFLOAT16)
    router, x = bench.normal(num_experts, hidden_size), bench.normal(num_tokens, hidden_size)
    for array, values in ((router, noise[:num_experts]), (x, noise[num_experts:])):
        array.data.copy_from_host(np.ascontiguousarray(values).ctypes.data, values.nbytes)
    marks = bench.integers(np.zeros(num_tokens))
    rows = ExpertRows.allocate(lambda shape, dtype: bench.integers(np.zeros(shape), dtype), num_tokens, routing, 2)
    hidden, products = bench.normal(num_tokens * top_k, features), bench.normal(num_tokens * top_k, hidden_size)
    out = bench.normal(num_tokens, hidden_size)

    def call(index: int) -> None:
        gate_up, down = weights[index % len(weights)]
        route(bench.library, x, router, marks, routing, rows)
        grouped_product(bench.library, x, gate_up, hidden, routing, rows, gathers=True, activation="silu")
        grouped_product(bench.library, hidden, down, products, routing, rows)
        combine(bench.library, products, rows, out)

    with bench.stream:
        call(0)
        bench.stream.synchronize()
    num_chosen = len(np.unique(rows.ids.get()))
    num_bytes, flops = num_chosen * expert_bytes, 2.0 * num_tokens * top_k * 3 * hidden_size * features
    microseconds = bench.microseconds(call, num_bytes)
    return {
        "model": model, "format": scheme, "tokens": num_tokens, "experts": num_chosen, "microseconds": round(microseconds, 2),
        "terabytes_per_second": round(num_bytes / microseconds / 1e6, 3),
        "teraflops": round(flops / microseconds / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    """Measure every model, format and number of tokens; a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    args = parser.parse_args()
    bench, results = Bench(), []
    for model, scheme, num_tokens in product(args.models, args.formats, args.tokens):
        results.append(measure(bench, model, scheme, num_tokens))
        print(*(f"{name}={value}" for name, value in results[-1].items()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
