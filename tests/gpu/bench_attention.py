"""Attention kernels on this GPU: bandwidth of decode, rate of prefill beside torch's scaled_dot_product_attention.

    python tests/gpu/bench_attention.py [decode] [latency] [plan] [prefill] [fp8]

``fp8``: decode and prefill over pages of e4m3 codes beside the same over bfloat16 pages.

Times are medians over replays of a CUDA graph of 16 launches, on shuffled pages that exceed the L2 cache. A decode's bytes
are its keys, values, queries and outputs, once each. A causal prefill's operations are 4 H C for each
visible (query, key) pair, for the kernel and for torch alike; torch gets contiguous keys, no block tables.
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
import ml_dtypes
import numpy as np

import launch  # noqa: F401  maps the checkout into the package
from phalanx.kernels.attention import PagedAttention
from phalanx.kernels.attention_shape import AttentionLimits, AttentionShape, AttentionStep
from phalanx.kernels.library import KernelLibrary

BANDWIDTH = 4.2e12  # a device copy on an H200, bytes a second
BLOCK_SIZE = 16
LAUNCHES = 16  # in one graph, as many layers would make
MODELS = {
    "llama-3-8b 32/8/128": (32, 8, 128),
    "gemma-2b 8/1/256": (8, 1, 256),
    "gemma-7b 16/16/256": (16, 16, 256),
    "llama-2-7b 32/32/128": (32, 32, 128),
    "gpt2 12/12/64": (12, 12, 64),
}


def random_elements(shape: tuple[int, ...]) -> Any:
    """bfloat16 values of either sign between 0.5 and 2."""
    bits = cupy.random.randint(0, 1 << 16, shape, dtype=cupy.uint16)
    return ((bits & 0x80FF) | 0x3F00).view(ml_dtypes.bfloat16)


def random_codes(shape: tuple[int, ...]) -> Any:
    """e4m3 codes of values of either sign between 0.5 and 2."""
    return (cupy.random.randint(0, 1 << 8, shape, dtype=cupy.uint8) & 0x8F) | 0x30


class Workload:
    """``num_seqs`` sequences of one length, each with ``new_tokens`` new ones, over enough layers to exceed the cache."""

    def __init__(
        self,
        library: Any,
        model: tuple[int, int, int],
        num_seqs: int,
        seq_len: int,
        new_tokens: int,
        has_fp8_pages: bool = False,
    ) -> None:
        heads, kv_heads, head_dim = model
        shape = AttentionShape(
            heads, kv_heads, head_dim, BLOCK_SIZE, "bfloat16", head_dim**-0.5, has_fp8_pages=has_fp8_pages
        )
        blocks = -(-seq_len // BLOCK_SIZE)
        num_blocks = num_seqs * blocks
        rows = num_seqs * new_tokens
        kv_bytes = num_seqs * seq_len * kv_heads * head_dim * (2 if has_fp8_pages else 4)
        self.num_bytes = kv_bytes + rows * heads * head_dim * 4
        num_layers = max(1, min(8, -(-400_000_000 // kv_bytes)))
        self.attention = PagedAttention(library, shape, AttentionLimits(num_seqs, rows, seq_len))
        self.attention.bind(cupy.zeros(self.attention.workspace_bytes, cupy.uint8))
        tables = np.random.default_rng(0).permutation(num_blocks).reshape(num_seqs, blocks)
        self.step = AttentionStep(
            cu_seqlens_q=cupy.arange(num_seqs + 1, dtype=cupy.int32) * new_tokens,
            seq_lens=cupy.full(num_seqs, seq_len, cupy.int32),
            seq_indices=cupy.arange(num_seqs, dtype=cupy.int32),
            block_tables=cupy.asarray(tables, cupy.int32),
            num_seqs_and_decodes=cupy.array([num_seqs, num_seqs if new_tokens == 1 else 0], cupy.int32),
        )
        self.qkv = random_elements((rows, (heads + 2 * kv_heads) * head_dim))
        pages = (num_blocks, kv_heads, BLOCK_SIZE, head_dim)
        make = random_codes if has_fp8_pages else random_elements
        self.pages = [(make(pages), make(pages)) for _ in range(num_layers)]
        self.kv_scales = cupy.ones((2, kv_heads), cupy.float32) if has_fp8_pages else None
        self.out = random_elements((rows, heads * head_dim))
        self.is_decode = new_tokens == 1

    def launch(self) -> None:
        run = self.attention.decode if self.is_decode else self.attention.prefill
        for layer in range(LAUNCHES):
            run(self.qkv, *self.pages[layer % len(self.pages)], self.out, self.step, self.kv_scales)

    def plan(self) -> None:
        for _ in range(LAUNCHES):
            self.attention.split_work(self.step)

    def seconds_per_layer(self) -> float:
        self.attention.split_work(self.step)
        return median_seconds(self.launch) / LAUNCHES


def median_seconds(enqueue: Any, repeats: int = 7) -> float:
    """Median time of one replay of ``enqueue``, captured in a CUDA graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        enqueue()
        stream.begin_capture()
        enqueue()
        graph = stream.end_capture()
        times = []
        for _ in range(repeats + 2):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return float(np.median(times[2:]))


def bench_decode(library: Any) -> None:
    print(f"{'decode: H/K/C':24}{'seqs':>6}{'history':>9}{'us':>9}{'TB/s':>7}{'of 4.2':>8}")
    cases = [
        (
            "llama-3-8b 32/8/128",
            [(64, 2048), (256, 2048), (1024, 2048), (1024, 128), (1024, 192), (1024, 256), (2048, 256)],
        ),
        (
            "gemma-2b 8/1/256",
            [(64, 2048), (256, 2048), (1024, 2048), (1024, 128), (1024, 192), (2048, 128), (2048, 256)],
        ),
        ("gemma-7b 16/16/256", [(64, 2048), (256, 192), (512, 192)]),
        ("llama-2-7b 32/32/128", [(64, 2048), (512, 192)]),
        ("gpt2 12/12/64", [(256, 1024), (1024, 192)]),
    ]
    for name, sizes in cases:
        for num_seqs, seq_len in sizes:
            report_decode(library, name, num_seqs, seq_len)


def bench_latency(library: Any) -> None:
    print(f"{'latency: H/K/C':24}{'seqs':>6}{'history':>9}{'us':>9}{'TB/s':>7}{'of 4.2':>8}")
    for name in ("llama-3-8b 32/8/128", "gemma-2b 8/1/256"):
        for num_seqs, seq_len in [(1, 128), (1, 256), (1, 2048), (1, 32768), (8, 256), (8, 8192)]:
            report_decode(library, name, num_seqs, seq_len)


def report_decode(library: Any, name: str, num_seqs: int, seq_len: int) -> None:
    work = Workload(library, MODELS[name], num_seqs, seq_len, 1)
    seconds = work.seconds_per_layer()
    rate = work.num_bytes / seconds
    print(
        f"{name:24}{num_seqs:6}{seq_len:9}{seconds * 1e6:9.1f}{rate / 1e12:7.2f}{rate / BANDWIDTH:8.1%}",
        flush=True,
    )


def bench_fp8(library: Any) -> None:
    print(
        f"{'fp8 pages: H/K/C':24}{'seqs':>6}{'history':>9}{'new':>6}{'bf16 us':>9}{'fp8 us':>9}{'faster':>8}{'TB/s':>7}"
    )
    for name in ("llama-3-8b 32/8/128", "gemma-2b 8/1/256", "gemma-7b 16/16/256"):
        for num_seqs, seq_len, new in [(64, 2048, 1), (256, 2048, 1), (512, 192, 1), (1, 2048, 1), (4, 2048, 2048)]:
            times = []
            for has_fp8_pages in (False, True):
                work = Workload(library, MODELS[name], num_seqs, seq_len, new, has_fp8_pages)
                times.append(work.seconds_per_layer())
                rate = work.num_bytes / times[-1]
                del work
                cupy.get_default_memory_pool().free_all_blocks()
            print(
                f"{name:24}{num_seqs:6}{seq_len:9}{new:6}{times[0] * 1e6:9.1f}{times[1] * 1e6:9.1f}"
                f"{times[0] / times[1]:8.2f}{rate / 1e12:7.2f}",
                flush=True,
            )


def bench_plan(library: Any) -> None:
    print(f"{'plan, once a step':24}{'seqs':>6}{'tokens':>9}{'us':>9}")
    for num_seqs, seq_len, new_tokens in [(1, 200, 1), (256, 2048, 1), (2048, 256, 1), (64, 128, 128), (4, 2048, 2048)]:
        work = Workload(library, MODELS["llama-3-8b 32/8/128"], num_seqs, seq_len, new_tokens)
        seconds = median_seconds(work.plan) / LAUNCHES
        print(f"{'':24}{num_seqs:6}{new_tokens:9}{seconds * 1e6:9.1f}", flush=True)


def bench_prefill(library: Any) -> None:
    print(
        f"{'prefill: H/K/C':24}{'seqs':>6}{'tokens':>9}{'us':>9}{'TFLOP/s':>9}{'torch':>8}{'of it':>8}  torch's backend"
    )
    for name in ("llama-3-8b 32/8/128", "gemma-2b 8/1/256", "gemma-7b 16/16/256", "gpt2 12/12/64"):
        for num_seqs, seq_len in [(16, 128), (64, 128), (8, 1024), (4, 2048), (1, 8192)]:
            work = Workload(library, MODELS[name], num_seqs, seq_len, seq_len)
            seconds = work.seconds_per_layer()
            heads, _, head_dim = MODELS[name]
            operations = 4 * heads * head_dim * num_seqs * seq_len * (seq_len + 1) / 2
            backend, reference = best_torch_seconds(MODELS[name], num_seqs, seq_len)
            rate, torch_rate = operations / seconds / 1e12, operations / reference / 1e12
            print(
                f"{name:24}{num_seqs:6}{seq_len:9}{seconds * 1e6:9.1f}{rate:9.1f}{torch_rate:8.1f}{rate / torch_rate:8.1%}"
                f"  {backend}",
                flush=True,
            )


def best_torch_seconds(model: tuple[int, int, int], num_seqs: int, seq_len: int) -> tuple[str, float]:
    """The fastest of torch's fused backends on the same sizes, causal, and its time."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, head_dim = model
    layout = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(num_seqs, heads, seq_len, head_dim, **layout)
    k, v = (torch.randn(num_seqs, kv_heads, seq_len, head_dim, **layout) for _ in range(2))
    results = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                results.append((_torch_seconds(q, k, v, torch), backend.name))
        except RuntimeError as error:
            print(f"torch {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
    seconds, name = min(results)
    return name, seconds


def _torch_seconds(q: Any, k: Any, v: Any, torch: Any, repeats: int = 7) -> float:
    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    for _ in range(3):
        attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            attend()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return float(np.median(times[2:])) / LAUNCHES


def main() -> None:
    library = KernelLibrary()
    benches = {
        "decode": bench_decode,
        "latency": bench_latency,
        "plan": bench_plan,
        "prefill": bench_prefill,
        "fp8": bench_fp8,
    }
    chosen = sys.argv[1:] or list(benches)
    for name, bench in benches.items():
        if name in chosen:
            bench(library)


if __name__ == "__main__":
    main()
