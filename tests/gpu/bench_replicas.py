"""One server over several layouts: ``python -m tests.gpu.bench_replicas 1x1x1 2x1x1`` (data x pipeline x tensor parallel).

Real sizes with random weights and a tokenizer of as many entries. For each layout a server gets streaming requests from
`launch.bench serve`, three times as many as run at once, twice. A line per layout to standard output, the better rate of the two over the
better one of the first layout; JSON and logs to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tests.gpu.bench_serving import MODELS, model_directory, run, server


def measured(args: argparse.Namespace, layout: tuple[int, int, int], directory: Path, vocab_size: int) -> list[Any]:
    """Reports of the runs."""
    dp, pp, tp = layout
    name = f"{dp}x{pp}x{tp}"
    flags = [
        str(directory), "--load-format", "dummy", "--engine", args.engine, "--dp", str(dp), "--pp", str(pp), "--tp", str(tp),
        "--max-num-seqs", str(args.max_num_seqs), "--max-num-batched-tokens", str(args.max_num_batched_tokens),
        "--max-model-len", str(args.input_len + args.output_len), "--quantize", args.quantize, "--kv-cache-dtype", args.kv_cache_dtype,
        "--max-queued-requests", str(3 * args.max_num_seqs * dp),
    ]  # fmt: skip
    reports = []
    with server(flags, args.out / f"{name}.log", dp * pp * tp) as url:
        for seed in range(2):
            result = args.out / f"{name}-{seed}.json"
            load = [
                "launch.bench", "serve", "--url", url, "--input-len", str(args.input_len), "--output-len", str(args.output_len),
                "--num-prompts", str(3 * args.max_num_seqs * dp), "--max-concurrency", str(args.max_num_seqs * dp),
                "--vocab-size", str(vocab_size), "--seed", str(seed), "--json", str(result),
            ]  # fmt: skip
            run(load, args.out / f"{name}-load.log")
            reports.append(json.loads(result.read_text()))
    return reports


def layout_of(text: str) -> tuple[int, int, int]:
    """Sizes from ``dp x pp x tp``."""
    if (found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not data x pipeline x tensor parallel, such as 2x1x4")
    return int(found[1]), int(found[2]), int(found[3])


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", type=layout_of, default=[(1, 1, 1), (2, 1, 1)], metavar="DPxPPxTP")
    parser.add_argument("--model", type=Path, default=MODELS / "llama-3-8b", help="directory with config.json")
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=1024, help="of each replica")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first = None
    with model_directory(args.model) as (directory, vocab_size):
        for layout in args.layouts:
            reports = measured(args, layout, directory, vocab_size)
            rates = [report["output_tokens_per_second"] for report in reports]
            first = first or max(rates)
            last = reports[-1]
            print(
                f"dp {layout[0]} x pp {layout[1]} x tp {layout[2]}: {max(rates):,.0f} tok/s ({' '.join(f'{rate:,.0f}' for rate in rates)}) = "
                f"{max(rates) / first:.2f} x; first token p99 {last['time_to_first_token_ms']['p99']:.0f} ms, per token p99 "
                f"{last['time_per_output_token_ms']['p99']:.1f} ms; {sum(report['failed_requests'] for report in reports)} failed",
                flush=True,
            )


if __name__ == "__main__":
    main()
