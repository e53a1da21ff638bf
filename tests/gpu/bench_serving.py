"""Served against offline, in one session on one machine: ``python -m tests.gpu.bench_serving [--streams 64 1024 3000]``.

Gemma 2B's sizes with random weights and a tokenizer of as many entries. For each number of streams, `launch.bench throughput`
generates for so many prompts at once; then one server gets the same load from `launch.bench serve`, and the same prompts again as they
come one after another (Poisson, at 80 % of the requests a second that it answered): of a thousand prompts at once the last waits for all
others, so only the second load says how evenly first tokens come. Two lines per number to standard output, JSON, logs and plots to
``--out``. Under four minutes on one H200 with 16 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.launcher import LAUNCHER_ENVIRONMENT
from tests.support.logs import why_it_failed
from tests.support.wide_tokenizer import write_wide_tokenizer

MODELS = Path(__file__).parent / "models"
ENVIRONMENT = {**os.environ, **LAUNCHER_ENVIRONMENT}
LIMIT_SECONDS = 300


def engine_flags(args: argparse.Namespace, directory: Path) -> list[str]:
    """What server and offline engine are started with alike."""
    flags = [
        str(directory), "--load-format", "dummy", "--engine", args.engine, "--max-num-seqs", str(args.max_num_seqs),
        "--max-model-len", str(args.input_len + max(output_len(args, streams) for streams in args.streams)),
    ]  # fmt: skip
    return [*flags, "--max-num-batched-tokens", str(args.max_num_batched_tokens)]


def output_len(args: argparse.Namespace, streams: int) -> int:
    """Few streams are fast, so they generate longer, to be measured for about as long."""
    return int(args.output_len * (2 if streams < 512 else 1))


def load_flags(args: argparse.Namespace, streams: int, result: Path) -> list[str]:
    """What both are given to do."""
    return [
        "--input-len", str(args.input_len), "--output-len", str(output_len(args, streams)), "--num-prompts", str(streams),
        "--json", str(result),
    ]  # fmt: skip


def run(command: Sequence[str], log: Path) -> None:
    """Run a command of ours to its end; one that fails ends this one with what it printed last."""
    try:
        with open(log, "w") as file:
            subprocess.run(
                [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, check=True, timeout=LIMIT_SECONDS,
                env=ENVIRONMENT,
            )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"{command[0]} failed: {why_it_failed(error, log)}") from None


def offline(args: argparse.Namespace, directory: Path, streams: int) -> dict[str, Any]:
    """`launch.bench throughput` of so many prompts, all at once."""
    result = args.out / f"offline-{streams}.json"
    mode = ["launch.bench", "throughput", *engine_flags(args, directory), *load_flags(args, streams, result)]
    run([*mode, "--num-iters", "2"], args.out / f"offline-{streams}.log")
    return dict(json.loads(result.read_text()))


@contextmanager
def server(flags: Sequence[str], log: Path, num_ranks: int = 1) -> Iterator[str]:
    """The address of `launch.serve` with these flags; ended afterwards."""
    launcher = ["mpirun", "-n", str(num_ranks)] if num_ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "launch.serve", *flags, "--port", "0"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=ENVIRONMENT)
    try:
        while (found := re.search(r"^READY (http://\S+)", log.read_text(), re.MULTILINE)) is None:
            if process.poll() is not None:
                raise SystemExit(f"the server ended; see {log}")
            time.sleep(0.1)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


@contextmanager
def model_directory(model: Path) -> Iterator[tuple[Path, int]]:
    """A directory with the config and a tokenizer of as many entries, and their number."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / model.name
        directory.mkdir()
        shutil.copy(model / "config.json", directory)
        write_wide_tokenizer(directory, vocab_size)
        yield directory, vocab_size


def served(args: argparse.Namespace, url: str, streams: int, vocab_size: int, *flags: str) -> dict[str, Any]:
    """`launch.bench serve` with so many streams at most, the second of two times."""
    name = f"served-{streams}{'-arriving' if flags else ''}"
    result = args.out / f"{name}.json"
    command = [
        "launch.bench", "serve", "--url", url, *load_flags(args, streams, result), "--max-concurrency", str(streams),
        "--vocab-size", str(vocab_size), "--plot", str(args.out / f"{name}.svg"), *flags,
    ]  # fmt: skip
    if args.num_clients is not None:
        command += ["--num-clients", str(args.num_clients)]
    for seed in range(2):
        run([*command, "--seed", str(seed)], args.out / f"{name}.log")
    return dict(json.loads(result.read_text()))


def arriving(args: argparse.Namespace, url: str, streams: int, vocab_size: int, requests_per_second: float) -> str:
    """The same prompts, one after another; how soon their first tokens come."""
    rate = 0.8 * requests_per_second
    through = served(args, url, streams, vocab_size, "--request-rate", f"{rate:.3f}")
    first = through["time_to_first_token_ms"]
    return (
        f"{streams} prompts, {rate:.0f}/s: first token p50 {first['p50']:.0f} p99 {first['p99']:.0f} ms = {first['p99'] / first['p50']:.2f}; "
        f"gap p99 {through['inter_token_latency_ms']['p99']:.1f} ms; {through['failed_requests']} failed"
    )


def line(streams: int, alone: dict[str, Any], through: dict[str, Any]) -> str:
    """The figures that are asked for."""
    rate, first = through["output_tokens_per_second"], through["time_to_first_token_ms"]
    step = through["time_per_output_token_ms"]["mean"]
    return (
        f"{streams} streams: served {rate:,.0f} tok/s = {rate / alone['output_tokens_per_second']:.1%} of offline "
        f"{alone['output_tokens_per_second']:,.0f} (runs {alone['runs_output_tokens_per_second']}); per token {step:.2f} ms, "
        f"offline {alone['time_per_output_token_ms']['mean']:.2f}; gap p99 {through['inter_token_latency_ms']['p99']:.1f} ms = "
        f"{through['inter_token_latency_ms']['p99'] / step:.2f} steps, longest p99 {through['stream_gap_ms']['p99']:.0f} ms; "
        f"first token p50 {first['p50']:.0f} p99 {first['p99']:.0f} ms = {first['p99'] / first['p50']:.2f}; "
        f"{through['output_tokens_per_event']:.3f} tokens an event; /health p99 {through['health_ms']['p99']:.0f} ms; "
        f"{through['failed_requests']} failed"
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "gemma-2b", help="directory with config.json")
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 1024, 3000])
    parser.add_argument("--max-num-seqs", type=int, default=3072)
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=4096,
        help="above --max-num-seqs: prompts wait where all tokens of a step are other sequences' next",
    )
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--http-processes", type=int, help="default: as launch.serve")
    parser.add_argument("--num-clients", type=int, help="default: as launch.bench")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with model_directory(args.model) as (directory, vocab_size):
        alone = {streams: offline(args, directory, streams) for streams in args.streams}
        flags = [*engine_flags(args, directory), "--max-queued-requests", str(max(args.streams))]
        if args.http_processes is not None:
            flags += ["--http-processes", str(args.http_processes)]
        with server(flags, args.out / "server.log") as url:
            for streams in args.streams:
                through = served(args, url, streams, vocab_size)
                print(line(streams, alone[streams], through), flush=True)
                print(arriving(args, url, streams, vocab_size, through["requests_per_second"]), flush=True)


if __name__ == "__main__":
    main()
