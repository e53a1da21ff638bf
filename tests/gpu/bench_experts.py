"""Speed of a mixture of experts on one GPU: bytes of the chosen experts' weights, or arithmetic, in a second.

    python tests/gpu/bench_experts.py [--json FILE]

Every figure is the median of replays of a CUDA graph that holds a layer's whole mixture (routing, both products, sum), over copies
of the weights that together exceed the second-level cache. Routers are random, so experts get about equal shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.experts import ExpertRows, Routing, combine, grouped_product, route
from tests.gpu.bench_kernels import BFLOAT16, Bench, copies_for

MODELS = {  # hidden, feed-forward, experts, chosen: of one rank
    "Mixtral 8x7B": (4096, 14336, 8, 2),
    "Mixtral 8x7B/2": (4096, 7168, 8, 2),
    "Qwen3 30B-A3B": (2048, 768, 128, 8),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)


def measure(bench: Bench, model: str, num_tokens: int) -> dict[str, object]:
    hidden_size, features, num_experts, top_k = MODELS[model]
    routing = Routing(num_experts, top_k, True, range(num_experts))
    matrix_bytes = 3 * hidden_size * features * 2
    copies = range(copies_for(matrix_bytes * num_experts))
    weights = [
        (bench.normal(num_experts * 2 * features, hidden_size), bench.normal(num_experts * hidden_size, features))
        for _ in copies
    ]
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
    num_bytes, flops = num_chosen * matrix_bytes, 2.0 * num_tokens * top_k * 3 * hidden_size * features
    microseconds = bench.microseconds(call, num_bytes)
    return {
        "model": model, "tokens": num_tokens, "experts": num_chosen, "microseconds": round(microseconds, 2),
        "terabytes_per_second": round(num_bytes / microseconds / 1e6, 3),
        "teraflops": round(flops / microseconds / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    """Measure every model and number of tokens; a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench, results = Bench(), []
    for model in MODELS:
        for num_tokens in TOKENS:
            results.append(measure(bench, model, num_tokens))
            print(*(f"{name}={value}" for name, value in results[-1].items()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
