"""Speed of the kernels on one GPU: achieved bandwidth of the memory-bound ones, matrix products against torch.

    python tests/gpu/bench_kernels.py [--json FILE] [--skip-gemm]

Every figure is the median of replays of a CUDA graph of many calls over operands that rotate through more memory than the
second-level cache holds. Bytes are the fewest that the operation can move: inputs once, outputs once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import cupy

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels import activation, embedding, norm, rotary, rows, sampling
from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.gemv import GEMV_SHAPES, GemvShape, gated_gemv
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from phalanx.runtime.sampling.fields import SAMPLING_STRUCT, SamplingParams, device_values
from phalanx.runtime.step import ADMISSION

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROTATED_BYTES = 256 << 20
TOKENS = (1, 64, 1024, 2048, 8192)
MODELS = {  # hidden, heads, kv heads, head dim, feed-forward, vocabulary: of one rank
    "Gemma 2B": (2048, 8, 1, 256, 16384, 256000),
    "Gemma 7B": (3072, 16, 16, 256, 24576, 256000),
    "Llama-3-8B": (4096, 32, 8, 128, 14336, 128256),
    "Llama-2-70B/8": (8192, 8, 1, 128, 3584, 4000),
}


GATED_SHAPES = tuple(
    GemvShape(num_warps, 2, unroll, prefetch_bytes)
    for num_warps, unroll in ((4, 4), (8, 2), (16, 1), (16, 2))
    for prefetch_bytes in (0, 4096, 16384)
)


class Bench:
    def __init__(self) -> None:
        self.library = KernelLibrary()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        values = np.random.default_rng(1).standard_normal(1 << 20, np.float32)
        self._noise = {dtype: values.astype(dtype) for dtype in (BFLOAT16, np.dtype(np.float32))}

    def normal(self, *shape: int, dtype: Any = BFLOAT16) -> Any:
        dtype = np.dtype(dtype)
        num_bytes, noise = int(np.prod(shape)) * dtype.itemsize, self._noise[dtype]
        memory = cupy.cuda.alloc(num_bytes)
        memory.copy_from_host(noise.ctypes.data, min(num_bytes, noise.nbytes))
        done = noise.nbytes
        while done < num_bytes:
            (memory + done).copy_from_device(memory, min(done, num_bytes - done))
            done *= 2
        return cupy.ndarray(shape, dtype=dtype, memptr=memory)

    def integers(self, values: Any, dtype: Any = np.int32) -> Any:
        return cupy.asarray(np.asarray(values, dtype))

    def microseconds(self, call: Callable[[int], None], num_bytes: float) -> float:
        """Median time of ``call(copy)``, over rotating copies."""
        num_calls = int(min(40, max(6, 1.5e-3 / (num_bytes / 4e12 + 1e-6))))
        with self.stream:
            call(0)
            self.stream.synchronize()
            self.stream.begin_capture()
            for index in range(num_calls):
                call(index)
            graph = self.stream.end_capture()
        samples = []
        for _ in range(6):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(self.stream)
            graph.launch(self.stream)
            stop.record(self.stream)
            stop.synchronize()
            samples.append(1e3 * cupy.cuda.get_elapsed_time(start, stop) / num_calls)
        return statistics.median(samples[1:])


def copies_for(num_bytes: float) -> int:
    return int(min(40, max(1, -(-ROTATED_BYTES // num_bytes))))


def row_kernels(bench: Bench, model: str, num_tokens: int) -> dict[str, tuple[float, float]]:
    """Name -> (microseconds, bytes)."""
    hidden, heads, kv_heads, head_dim, features, vocab_size = MODELS[model]
    t, library, results = num_tokens, bench.library, {}

    def measure(name: str, num_bytes: float, make: Callable[[], Callable[[], None]]) -> None:
        calls = [make() for _ in range(copies_for(num_bytes))]
        results[name] = (bench.microseconds(lambda index: calls[index % len(calls)](), num_bytes), num_bytes)

    weight = bench.normal(hidden)

    def make_norm() -> Callable[[], None]:
        x, residual, out = (bench.normal(t, hidden) for _ in range(3))
        return lambda: norm.rms_norm(library, x, weight, out, epsilon=1e-6, residual=residual)

    measure("residual + rms_norm", 2 * t * hidden * 4, make_norm)

    def make_gated() -> Callable[[], None]:
        x, out = bench.normal(t, 2 * features), bench.normal(t, features)
        return lambda: activation.gated_activation(library, x, out, "silu")

    measure("gated silu", 2 * t * features * 3, make_gated)

    tables = rotary.RotaryTables(*(bench.normal(4096, head_dim // 2, dtype=np.float32) for _ in range(2)))
    positions = bench.integers(np.arange(t) % 4096)
    slots = bench.integers(np.random.default_rng(2).permutation(2 * t)[:t])

    def make_rotary() -> Callable[[], None]:
        qkv = bench.normal(t, (heads + 2 * kv_heads) * head_dim)
        pages = [bench.normal(-(-2 * t // 16), kv_heads, 16, head_dim) for _ in range(2)]
        return lambda: rotary.rotary_kv_write(library, qkv, positions, slots, *pages, tables, num_heads=heads)

    measure("rotary + kv write", 2 * t * head_dim * (2 * heads + 4 * kv_heads), make_rotary)

    table = bench.normal(vocab_size, hidden)
    ids = [bench.integers(np.random.default_rng(i).integers(0, vocab_size, t)) for i in range(40)]
    outputs = [bench.normal(t, hidden) for _ in range(copies_for(4 * t * hidden))]
    gather = lambda i: embedding.embedding(library, ids[i % 40], table, outputs[i % len(outputs)])  # noqa: E731
    results["embedding"] = (bench.microseconds(gather, 4 * t * hidden), 4.0 * t * hidden)
    return results


def sampling_kernels(bench: Bench, model: str, num_rows: int) -> dict[str, tuple[float, float]]:
    vocab_size = MODELS[model][5]
    library, results = bench.library, {}
    num_bytes = 2.0 * num_rows * vocab_size
    logits = [bench.normal(num_rows, vocab_size) for _ in range(copies_for(num_bytes))]
    keys = cupy.empty((sampling.num_splits(num_rows, vocab_size), num_rows), np.uint64)
    tokens = cupy.empty(num_rows, np.int32)

    def parameters(temperature: float, top_k: int, top_p: float, **fields: float) -> sampling.RowParameters:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, **fields)
        records = np.array([(row, *device_values(params, vocab_size), 1, 0, 7) for row in range(num_rows)], ADMISSION)
        words = bench.integers(records.view(np.int32).reshape(num_rows, -1))
        return sampling.RowParameters(words, bench.integers(np.arange(num_rows)), SAMPLING_STRUCT)

    def local(rule: sampling.RowParameters) -> Callable[[int], None]:
        def call(index: int) -> None:
            part = logits[index % len(logits)]
            sampling.local_argmax(library, part, rule, keys, vocab_start=0, vocab_size=vocab_size)
            sampling.merge_argmax(library, keys, tokens)

        return call

    def whole(rule: sampling.RowParameters) -> Callable[[int], None]:
        def call(index: int) -> None:
            sampling.sample_rows(library, logits[index % len(logits)][None], rule, tokens, vocab_size=vocab_size)

        return call

    logprobs = cupy.empty(num_rows, np.float32)
    top_ids, top = cupy.empty((num_rows, 5), np.int32), cupy.empty((num_rows, 5), np.float32)

    def score(index: int) -> None:
        part = logits[index % len(logits)][None]
        sampling.log_probabilities(library, part, tokens, logprobs, top_ids, top, vocab_size=vocab_size)

    def adjust(context: int, **fields: float) -> Callable[[int], None]:
        """Penalties over ``context`` tokens of each row's sequence, or a bare copy."""
        rule = parameters(0.0, 0, 1.0, **fields)
        tables = bench.integers(np.arange(num_rows * context // 16).reshape(num_rows, -1))
        cached = bench.integers(np.random.default_rng(1).integers(0, vocab_size, (num_rows * context // 16, 16)))
        positions = bench.integers(np.full(num_rows, context))
        rows = sampling.RowParameters(rule.records, positions, SAMPLING_STRUCT)
        biases = cupy.zeros((num_rows, 1, 4), np.int32)
        masks = sampling.PlanMasks(bench.integers(np.full(num_rows, -1)), biases.reshape(-1))
        cache, out = sampling.TokenCache(tables, cached), cupy.empty((num_rows, vocab_size), np.float32)
        return lambda index: sampling.adjust_logits(
            library, logits[index % len(logits)], rows, biases, cache, masks, out, vocab_start=0, vocab_size=vocab_size
        )

    calls = {
        "adjusted logits": adjust(16),
        "penalties over 1,024 tokens": adjust(1024, repetition_penalty=1.2, frequency_penalty=0.5),
        "penalties over 16,384 tokens": adjust(16384, repetition_penalty=1.2, frequency_penalty=0.5),
        "greedy": local(parameters(0.0, 0, 1.0)),
        "random": local(parameters(1.0, 0, 1.0)),
        "rows random": whole(parameters(1.0, 0, 1.0)),
        "top-k 50": whole(parameters(0.7, 50, 1.0)),
        "top-p 0.9": whole(parameters(0.7, 0, 0.9)),
        "top-k, top-p": whole(parameters(0.7, 50, 0.9)),
        "log-probabilities, 5": score,
    }
    for name, call in calls.items():
        results[name] = (bench.microseconds(call, num_bytes), num_bytes)
    return results


def gemm_shapes(model: str) -> dict[str, tuple[int, int]]:
    hidden, heads, kv_heads, head_dim, features, vocab_size = MODELS[model]
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * features, hidden),
        "down": (hidden, features),
        "head": (vocab_size, hidden),
    }


def torch_microseconds(bench: Bench, problem: GemmProblem) -> float:
    import torch

    t, o, i = problem.num_tokens, problem.out_features, problem.in_features
    x = torch.randn(t, i, device="cuda", dtype=torch.bfloat16)
    weights = [
        torch.randn(o, i, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies_for(problem.weight_bytes))
    ]
    out = torch.empty(t, o, device="cuda", dtype=torch.bfloat16)
    seconds = max(2.0 * t * o * i / 600e12, problem.weight_bytes / 4e12)
    num_calls = min(40, max(4, int(1.5e-3 / seconds)))
    torch.mm(x, weights[0].t(), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(num_calls):
            torch.mm(x, weights[call % len(weights)].t(), out=out)
    samples = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(1e3 * start.elapsed_time(stop) / num_calls)
    return statistics.median(samples[1:])


def gemm_table(bench: Bench, tokens: tuple[int, ...], with_torch: bool) -> list[dict[str, Any]]:
    timings = GemmTimings(None)
    gemm = Gemm(bench.library, CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), timings)
    tuner, table = GemmTuner(gemm, timings), []
    for model in MODELS:
        for name, (out_features, in_features) in gemm_shapes(model).items():
            for t in tokens:
                if name == "head" and t > 2048:
                    continue
                problem = GemmProblem(t, out_features, in_features, "bfloat16", "bfloat16")
                (choice,) = tuner.tune([problem]).values()
                timed = tuner.timed_operands(problem)
                gemv = {}
                if t <= 16:
                    gemv = {str(s): tuner.measure(problem, GemmChoice(s), timed) for s in GEMV_SHAPES}
                lt = gemm.algorithms(problem, 16)
                best_lt = choice.microseconds
                if isinstance(choice.kernel, GemvShape):
                    best_lt = min(tuner.measure(problem, GemmChoice(c), timed) for c in lt)
                table.append(
                    {
                        "model": model, "gemm": name, "shape": [t, out_features, in_features],
                        "torch": torch_microseconds(bench, problem) if with_torch else None,
                        "first": choice.first_microseconds, "cublaslt": best_lt, "ours": choice.microseconds,
                        "kernel": str(choice.kernel) if isinstance(choice.kernel, GemvShape) else "cublaslt",
                        "gemv": gemv, "gigabytes_per_second": problem.weight_bytes / choice.microseconds / 1e3,
                        "teraflops": 2e-6 * t * out_features * in_features / choice.microseconds,
                    }
                )  # fmt: skip
                print_gemm(table[-1])
    gemm.close()
    return table


def print_gemm(row: dict[str, Any]) -> None:
    best = min(row["gemv"].items(), key=lambda item: item[1]) if row["gemv"] else ("", 0.0)
    torch_time = f"{row['torch']:8.1f}" if row["torch"] else "       -"
    print(
        f"{row['model']:14} {row['gemm']:8} {row['shape']!s:22} torch {torch_time} first {row['first']:8.1f} "
        f"lt {row['cublaslt']:8.1f} ours {row['ours']:8.1f} {row['gigabytes_per_second']:6.0f} GB/s "
        f"{row['teraflops']:5.0f} TF  {best[0][9:]} {best[1]:.1f}"
    )


def gated_gemv_times(bench: Bench, model: str) -> dict[GemvShape, float]:
    """Microseconds of the fused gate, up and activation for one token, by shape of block."""
    results = {}
    hidden, features = MODELS[model][0], MODELS[model][4]
    num_bytes = 4.0 * features * hidden
    weights = [bench.normal(2 * features, hidden) for _ in range(copies_for(num_bytes))]
    x, out = bench.normal(1, hidden), bench.normal(1, features)

    def call(shape: GemvShape) -> Callable[[int], None]:
        return lambda i: gated_gemv(bench.library, x, weights[i % len(weights)], out, "silu", shape=shape)

    for shape in GATED_SHAPES:
        results[shape] = bench.microseconds(call(shape), num_bytes)
    return results


def decode_chain(bench: Bench, model: str, kind: str, gated: GemvShape, num_layers: int = 8) -> float:
    """Microseconds a layer of one token through everything but attention, by ``kind`` of product.

    "cublaslt": its tuned algorithms; "tuned": whatever the tuner prefers; "gated": the same, with the activation in gemv.
    """
    hidden, heads, kv_heads, head_dim, features, _ = MODELS[model]
    library, timings = bench.library, GemmTimings(None)
    gemm = Gemm(library, CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), timings)
    tuner = GemmTuner(gemm, timings)
    shapes = gemm_shapes(model)
    problems = [GemmProblem(1, *shapes[name], "bfloat16", "bfloat16") for name in ("qkv", "o", "gate_up", "down")]
    if kind == "cublaslt":
        for problem in problems:
            candidates = [GemmChoice(c) for c in gemm.algorithms(problem, 16)]
            operands = tuner.timed_operands(problem)
            timings.add({problem: min(candidates, key=lambda c: tuner.measure(problem, c, operands))})
    else:
        tuner.tune(problems)
    layers = [{name: bench.normal(*shapes[name]) for name in shapes if name != "head"} for _ in range(num_layers)]
    x, residual, norm_weight = bench.normal(1, hidden), bench.normal(1, hidden), bench.normal(hidden)
    qkv, attended = bench.normal(1, shapes["qkv"][0]), bench.normal(1, heads * head_dim)
    both, inner = bench.normal(1, 2 * features), bench.normal(1, features)
    tables = rotary.RotaryTables(*(bench.normal(64, head_dim // 2, dtype=np.float32) for _ in range(2)))
    pages = [bench.normal(4, kv_heads, 16, head_dim) for _ in range(2)]
    position, slot = bench.integers([5]), bench.integers([7])
    normed = bench.normal(1, hidden)

    def call(index: int) -> None:
        weights = layers[index % num_layers]
        norm.rms_norm(library, x, norm_weight, normed, epsilon=1e-6, residual=residual)
        gemm(normed, weights["qkv"], qkv)
        rotary.rotary_kv_write(library, qkv, position, slot, *pages, tables, num_heads=heads)
        gemm(attended, weights["o"], x)
        norm.rms_norm(library, x, norm_weight, normed, epsilon=1e-6, residual=residual)
        if kind == "gated":
            gated_gemv(library, normed, weights["gate_up"], inner, "silu", shape=gated)
        else:
            gemm(normed, weights["gate_up"], both)
            activation.gated_activation(library, both, inner, "silu")
        gemm(inner, weights["down"], x)

    result = bench.microseconds(call, sum(problem.weight_bytes for problem in problems))
    gemm.close()
    return result


def copy_rate(bench: Bench) -> float:
    """Gigabytes a second of a copy by a kernel, read and written: what the memory-bound kernels are measured against."""
    num_rows, width = 1 << 17, 8192
    source, target = (bench.normal(num_rows, width) for _ in range(2))
    order = bench.integers(np.arange(num_rows))
    copy = lambda _: rows.gather_rows(bench.library, source, order, target)  # noqa: E731
    return 2 * source.nbytes / bench.microseconds(copy, 2 * source.nbytes) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-gemm", action="store_true")
    parser.add_argument("--gemm-tokens", default="1,8,64,1024,2048")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    begin, bench, report = time.time(), Bench(), {"rows": [], "gemm": [], "chain": []}
    print(f"device copy {copy_rate(bench):.0f} GB/s")
    for model in ("Gemma 2B", "Llama-3-8B"):
        for t in TOKENS:
            measured = row_kernels(bench, model, t)
            if t <= 2048:
                measured |= sampling_kernels(bench, model, t)
            for name, (time_, num_bytes) in measured.items():
                report["rows"].append([model, t, name, time_, num_bytes])
            print(
                f"{model} T={t}: " + "; ".join(f"{n} {us:.1f} us {b / us / 1e3:.0f}" for n, (us, b) in measured.items())
            )
            cupy.get_default_memory_pool().free_all_blocks()
    print(f"{time.time() - begin:.0f} s")
    if not options.skip_gemm:
        for model in MODELS:
            gated = gated_gemv_times(bench, model)
            best = min(gated, key=lambda shape: gated[shape])
            print(f"gated gemv {model:14} best {best} " + " ".join(f"{us:.1f}" for us in gated.values()))
            chains = {kind: decode_chain(bench, model, kind, best) for kind in ("cublaslt", "tuned", "gated")}
            print(f"decode chain {model:14} " + "; ".join(f"{kind} {us:.1f} us" for kind, us in chains.items()))
        tokens = tuple(int(t) for t in options.gemm_tokens.split(","))
        report["gemm"] = gemm_table(bench, tokens, not options.no_torch)
    print(f"{time.time() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
