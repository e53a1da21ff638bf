"""Phalanx against transformers on this machine's processor, as ratios in one run: ``python -m tools.bench_cpu``.

GPT-2-small shape (12 layers x 768), random weights, two threads in total. Needs torch and transformers. Every figure is the
median of several runs, the two sides taken in turn, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

GPT2_SMALL = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
    "n_head": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
NUM_SEQS, PROMPT_LEN, NEW_TOKENS, PREFILL_LEN = 8, 32, 64, 512


def in_turn(rounds: int, *sides: Callable[[], float]) -> list[float]:
    """Median seconds of each side, after one round to warm up."""
    times: list[list[float]] = [[] for _ in sides]
    for index in range(rounds + 1):
        for side, seconds in zip(sides, times, strict=True):
            taken = side()
            if index:
                seconds.append(taken)
    return [statistics.median(seconds) for seconds in times]


def phalanx_decode(llm: Any) -> float:
    """Seconds for NEW_TOKENS - 1 decoding steps of NUM_SEQS sequences (prefill subtracted by measuring it apart)."""
    return generate(llm, NEW_TOKENS) - generate(llm, 1)


def generate(llm: Any, max_tokens: int) -> float:
    """Seconds to continue NUM_SEQS prompts by ``max_tokens``."""
    from phalanx import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompts = [[(17 * row + 3 * column) % 50257 for column in range(PROMPT_LEN)] for row in range(NUM_SEQS)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert all(len(output.token_ids) == max_tokens for output in outputs)
    return seconds


def transformers_decode(model: Any) -> float:
    """The same with greedy ``generate``."""
    return transformers_generate(model, NEW_TOKENS) - transformers_generate(model, 1)


def transformers_generate(model: Any, max_tokens: int) -> float:
    """Seconds of one greedy ``generate``."""
    import torch

    prompts = torch.tensor(
        [[(17 * row + 3 * column) % 50257 for column in range(PROMPT_LEN)] for row in range(NUM_SEQS)]
    )
    options = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    seconds = time.perf_counter() - start
    assert tokens.shape[1] == PROMPT_LEN + max_tokens
    return seconds


def phalanx_prefill(llm: Any) -> float:
    """Seconds for a prompt of PREFILL_LEN tokens and its first new one."""
    from phalanx import SamplingParams

    start = time.perf_counter()
    llm.generate(
        [[time.perf_counter_ns() % 50257, *range(PREFILL_LEN - 1)]], SamplingParams(max_tokens=1, temperature=0.0)
    )
    return time.perf_counter() - start


def transformers_prefill(model: Any) -> float:
    """The same as one forward pass that keeps its cache and the last row of logits."""
    import torch

    token_ids = torch.arange(PREFILL_LEN)[None]
    start = time.perf_counter()
    with torch.inference_mode():
        model(token_ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def mixed_lengths(llm: Any) -> tuple[float, float]:
    """Seconds for 32 requests of very different output lengths: in flight, and in static batches of NUM_SEQS.

    A static batch computes all of its rows until its longest request is finished; what the others get beyond their length is
    thrown away.
    """
    from phalanx import SamplingParams

    lengths = [4, 8, 6, 120, 5, 7, 9, 10] * 4
    prompts = [[index + 1] * 8 for index in range(len(lengths))]
    params = [SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for length in lengths]
    start = time.perf_counter()
    llm.generate(prompts, params)
    in_flight = time.perf_counter() - start
    start = time.perf_counter()
    for first in range(0, len(prompts), NUM_SEQS):
        batch = slice(first, first + NUM_SEQS)
        longest = max(params[batch], key=lambda one: one.max_tokens)
        llm.generate(prompts[batch], longest)
    return in_flight, time.perf_counter() - start


def tensor_parallel_decode(directory: Path, ranks: int, threads: int) -> float:
    """Milliseconds per token of ``launch.bench`` under mpirun."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [
        "mpirun", "-n", str(ranks), sys.executable, "-m", "launch.bench", "throughput", "--model", str(directory),
        "--load-format", "dummy", "--dtype", "float32", "--engine", "numpy", "--num-prompts", str(NUM_SEQS),
        "--input-len", str(PROMPT_LEN), "--output-len", str(NEW_TOKENS),
    ]  # fmt: skip
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout)["time_per_output_token_ms"]["p50"])


def main() -> None:
    """Print one JSON object."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from phalanx import LLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    directory = Path(tempfile.mkdtemp())
    (directory / "config.json").write_text(json.dumps(GPT2_SMALL))
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    llm = LLM(directory, load_format="dummy", engine="numpy", max_num_seqs=NUM_SEQS, prefix_caching=False)
    ours, theirs = in_turn(rounds, lambda: phalanx_decode(llm), lambda: transformers_decode(reference))
    ours_prefill, theirs_prefill = in_turn(
        rounds, lambda: phalanx_prefill(llm), lambda: transformers_prefill(reference)
    )
    in_flight, static = mixed_lengths(llm)
    pairs = [(tensor_parallel_decode(directory, 1, 2), tensor_parallel_decode(directory, 2, 1)) for _ in range(rounds)]
    one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(json.dumps({
        "decode_8_sequences": {"phalanx_ms": 1e3 * ours / 63, "transformers_ms": 1e3 * theirs / 63, "ratio": theirs / ours},
        "prefill_512": {"phalanx_ms": 1e3 * ours_prefill, "transformers_ms": 1e3 * theirs_prefill,
                        "ratio": theirs_prefill / ours_prefill},
        "in_flight_batching": {"in_flight_s": in_flight, "static_s": static, "ratio": static / in_flight},
        "tp2_over_tp1": {"tp1_two_threads_ms": one, "tp2_one_thread_each_ms": two, "ratio": one / two},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
