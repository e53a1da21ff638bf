# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.bench``: throughput and latency of this machine, or load against a server.

Greedy, end-of-sequence ignored, fixed lengths, random prompts; output tokens only are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    engine_config,
    job_arguments,
    run_command,
)
from phalanx.launch.bench_report import summary, table
from phalanx.launch.load.arguments import add_serve_arguments
from phalanx.launch.loading import start_progress
from phalanx.launch.progress import Progress
from phalanx.launch.sharing import check_writable
from phalanx.launch.version import installed_versions

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.executors.base import Executor
    from phalanx.runtime.measure import Measurement
    from phalanx.runtime.replica import Replica
    from phalanx.runtime.request import Request
    from phalanx.runtime.step.times import DeviceTimes

__all__ = ["main"]


def build_parser() -> CommandParser:
    """Return the command's parser, with a mode for each of throughput, latency and serve."""
    parser = CommandParser(prog="launch.bench", description="Measure throughput and latency.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="throughput|latency|serve")
    for mode, what in (("throughput", "all requests at once"), ("latency", "one request after the other")):
        measured = modes.add_parser(mode, help=what)
        _add_load_arguments(measured, default_prompts=64 if mode == "throughput" else 3)
        measured.add_argument(
            "--num-iters", type=int, default=1, metavar="N", help="measure N times; the median run is reported"
        )
        measured.add_argument(
            "--trace", type=Path, metavar="FILE", help="Chrome trace of every rank (opens in Perfetto)"
        )
        add_model_arguments(measured)
        add_parallel_arguments(measured)
        add_engine_arguments(measured)
    served = modes.add_parser("serve", help="load against an OpenAI-compatible server")
    add_serve_arguments(served)
    _add_load_arguments(served, default_prompts=64)
    return parser


def _add_load_arguments(parser: argparse.ArgumentParser, default_prompts: int) -> None:
    parser.add_argument("--input-len", type=int, default=128, metavar="TOKENS", help="length of each prompt")
    parser.add_argument(
        "--output-len", type=int, default=128, metavar="TOKENS", help="tokens generated for each prompt"
    )
    parser.add_argument("--num-prompts", type=int, default=default_prompts, metavar="N", help="number of requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints one JSON object on standard output of rank 0. 1 when requests failed."""
    parser = build_parser()
    args, world = job_arguments(parser, argv)
    _check_load(args)
    if args.json is not None:
        check_writable(world, "--json", args.json)
    if args.mode == "serve":
        from phalanx.launch.bench_serve import run_serve

        served = run_serve(args)
        _write({**served, "command": parser.command_line(argv)}, args)
        return 1 if served["failed_requests"] else 0
    report = _measure(args, world)
    if report is not None:
        _write({**report, "command": f"mpirun -n {world.size} {parser.command_line(argv)}"}, args)
    return 0


def _check_load(args: argparse.Namespace) -> None:
    from phalanx.parallel.errors import ConfigError

    for name in ("input_len", "output_len", "num_prompts", "num_iters"):
        if getattr(args, name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} is below 1; use at least 1")


def _measure(args: argparse.Namespace, world: Communicator) -> dict[str, Any] | None:
    from phalanx.parallel.errors import ConfigError
    from phalanx.parallel.liveness.judge import Limits
    from phalanx.parallel.liveness.progress import RankProgress
    from phalanx.parallel.liveness.watch import RankWatch
    from phalanx.runtime.replica import build_replica

    if args.max_queued_requests is None:
        args.max_queued_requests = args.num_prompts
    if args.max_model_len is None:
        args.max_model_len = args.input_len + args.output_len
    options = dataclasses.replace(engine_config(args, world.size), trace=args.trace is not None)
    if options.layout.dp > 1:
        raise ConfigError(f"dp={options.layout.dp}: phalanx bench measures one replica; start it with dp=1")
    progress = RankProgress()
    with RankWatch(world, progress, Limits()):
        with start_progress(world.rank == 0) as on_phase, progress.reporting(on_phase):
            replica = build_replica(args.model, options, world, progress)
        return _measure_on_ranks(args, replica)


def _measure_on_ranks(args: argparse.Namespace, replica: Replica) -> dict[str, Any] | None:
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.engine import follow
    from phalanx.runtime.executors.base import Traced
    from phalanx.runtime.executors.registry import choose_engine

    executor = replica.executor
    if args.trace is not None and not isinstance(executor, Traced):
        engine = choose_engine(replica.options.engine)
        raise ConfigError(f"--trace: the {engine} engine records no timeline; use --engine cuda")
    report = None
    if replica.engine is not None:
        report = _median(_run(args, replica))
        replica.engine.release()
    else:
        follow(replica.control, executor, replica.progress)
    if isinstance(executor, Traced) and args.trace is not None:
        executor.write_trace(args.trace, replica.group)
    executor.close()
    return report


def _run(args: argparse.Namespace, replica: Replica) -> list[dict[str, Any]]:
    """Report each iteration; iterations have different prompts, so that none finds them in the cache."""
    from phalanx.runtime.measure import measure

    engine = replica.engine
    assert engine is not None
    vocab_size = replica.config.vocab_size
    measure(engine, _requests(args, vocab_size, args.num_iters, min(args.num_prompts, 2), min(args.output_len, 4)))
    reports = []
    for iteration in range(args.num_iters):
        requests = _requests(args, vocab_size, iteration, args.num_prompts, args.output_len)
        before = replica.executor.device_times
        with Progress("measuring", args.num_prompts * args.output_len, "output tokens") as progress:
            if args.mode == "throughput":
                runs = [measure(engine, requests, progress.advance)]
            else:
                runs = [measure(engine, [request], progress.advance) for request in requests]
        reports.append(_report(args, replica, runs, _idle_fraction(replica.executor, before)))
    return reports


def _median(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of the median throughput, with the throughput of every iteration."""
    rates = [report["output_tokens_per_second"] for report in reports]
    return {**reports[rates.index(statistics.median_low(rates))], "runs_output_tokens_per_second": rates}


def _requests(
    args: argparse.Namespace, vocab_size: int, iteration: int, num_requests: int, output_len: int
) -> list[Request]:
    import numpy as np

    from phalanx.runtime.request import Request, SamplingParams

    random = np.random.default_rng((args.seed, iteration))
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    prompts = random.integers(0, vocab_size, (num_requests, args.input_len))
    return [Request(f"{iteration}-{index}", tuple(prompt.tolist()), params) for index, prompt in enumerate(prompts)]


def _report(
    args: argparse.Namespace, replica: Replica, runs: list[Measurement], idle_fraction: float | None
) -> dict[str, Any]:
    from phalanx.runtime.executors.registry import choose_engine
    from phalanx.runtime.quantisation import quantisation_in_words

    seconds = sum(run.seconds for run in runs)
    output_tokens = sum(run.output_tokens for run in runs)
    steps = [step for run in runs for step in _step_seconds(run)]
    layout, executor = replica.options.layout, replica.executor
    return {
        "mode": args.mode,
        "model": replica.config.architecture if args.model is None else str(args.model),
        "engine": choose_engine(replica.options.engine),
        "dtype": replica.config.compute_dtype(args.dtype),
        "quantize": replica.options.quantize,
        "kv_cache_dtype": replica.options.kv_cache_dtype,
        "quantisation": quantisation_in_words(
            replica.family, replica.config, replica.checkpoint.formats, replica.options
        ),
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "num_prompts": args.num_prompts,
        "max_num_seqs": replica.options.max_num_seqs,
        "num_microbatches": _num_microbatches(args, replica),
        "seconds": seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (output_tokens + args.num_prompts * args.input_len) / seconds,
        "steady_output_tokens_per_second": statistics.median(run.steady_tokens_per_second for run in runs),
        "mean_step_ms": 1e3 * statistics.fmean(steps),
        "time_to_first_token_ms": summary([value for run in runs for value in run.first_token]),
        "time_per_output_token_ms": summary([value for run in runs for value in run.time_per_output_token]),
        "gpu_idle_fraction": idle_fraction,
        "kv_blocks": executor.cache.num_blocks,
        "device": executor.device,
        "versions": installed_versions(),
    }


def _idle_fraction(executor: Executor, before: DeviceTimes | None) -> float | None:
    """Of the steps since ``before``; None where the executor does not measure."""
    now = executor.device_times
    return None if now is None or before is None else (now - before).idle_fraction


def _num_microbatches(args: argparse.Namespace, replica: Replica) -> int:
    """Micro-batches while as many requests decode at once as slots and cache hold."""
    assert replica.engine is not None
    if args.mode == "latency":
        return 1
    num_cached = replica.executor.cache.num_blocks * replica.options.block_size // (args.input_len + args.output_len)
    num_seqs = min(args.num_prompts, replica.options.max_num_seqs, max(num_cached, 1))
    return replica.engine.scheduler.num_microbatches(num_seqs)


def _step_seconds(run: Measurement) -> list[float]:
    import numpy as np

    return [float(value) for value in np.diff(run.step_ends, prepend=0.0)]


def _write(report: dict[str, Any], args: argparse.Namespace) -> None:
    import msgspec

    encoded = msgspec.json.encode(report)
    sys.stderr.write(table(report))
    print(encoded.decode())
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(encoded) + b"\n")


if __name__ == "__main__":
    run_command(main)
