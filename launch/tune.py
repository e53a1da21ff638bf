# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.tune``: show or refresh the cache of matrix product timings of this GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import CommandParser, own_arguments, run_command
from phalanx.launch.progress import Progress

if TYPE_CHECKING:
    from phalanx.kernels.cublaslt import GemmProblem
    from phalanx.kernels.gemm_tuner import GemmTuner
    from phalanx.kernels.tuning import GemmTimings
    from phalanx.runtime.config import ModelConfig
    from phalanx.runtime.models.base import Model

__all__ = ["gemm_problems", "main"]

_TOKENS = "1,2,4,8,16,32,64,128,192,256,512,768,1024,1536,2048,4096,8192"


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.tune",
        description="Time cuBLASLt's algorithms and our own kernels for a model's matrix products, once per kind of GPU. "
        "Without --model: print what has been measured.",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="directory with config.json; no weights are needed")
    parser.add_argument(
        "--tensor-parallel-size", "--tp", dest="tp", type=int, default=1, metavar="N", help="shapes of one of N ranks"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute type; auto: the checkpoint's own",
    )
    parser.add_argument("--tokens", default=_TOKENS, metavar="LIST", help=f"tokens in a step (default {_TOKENS})")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.no_effect("without --model, whose products are timed; add that", lambda args: args.model is None,
                     "--tp", "--dtype", "--tokens", "--again")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = own_arguments(build_parser(), argv)
    tokens = _token_counts(args.tokens)
    problems = _problems_of(args, tokens) if args.model is not None else []
    timings, tuner = _open_tuner()
    with Progress("timing", len(problems), "products") as progress:
        for problem in problems:
            tuner.tune([problem], again=args.again)
            progress.advance()
    wanted = {problem.key for problem in problems}
    shown = [(key, choice) for key, choice in timings.items() if not wanted or key in wanted]
    rows = [{"problem": key, **choice.to_json()} for key, choice in shown]
    print(json.dumps({"file": str(timings.path), "timings": rows}) if args.json else _table(timings, rows))
    return 0


def gemm_problems(
    model: Model, config: ModelConfig, tp: int, dtype: str, tokens: Sequence[int]
) -> Iterator[GemmProblem]:
    """The distinct products of one block and the head on rank 0 of ``tp``, as the CUDA executor poses them."""
    from phalanx.kernels.cublaslt import GemmProblem
    from phalanx.runtime.models.shapes import use_of

    experts = use_of(model, config).experts  # multiplied by our own kernels, which are not timed
    specs = {spec.name: spec for spec in model.weights(config, range(1), first=False, last=True)}
    seen: set[tuple[int, int, bool]] = set()
    for name, spec in specs.items():
        shape = spec.local_shape(0, tp)
        if len(shape) != 2 or not name.endswith(".weight") or spec.owner.rpartition(".")[0] in experts:
            continue
        bias = specs.get(name.removesuffix("weight") + "bias")
        # A row-parallel bias is added once, after the sum over ranks.
        has_bias = bias is not None and (tp == 1 or any(part.shard is not None for part in bias.parts))
        if (*shape, has_bias) not in seen:
            seen.add((*shape, has_bias))
            for num_tokens in tokens:
                yield GemmProblem(num_tokens, *shape, dtype, dtype, has_bias)


def _token_counts(text: str) -> list[int]:
    from phalanx.parallel.errors import ConfigError

    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise ConfigError(f"--tokens={text} is not a list of positive numbers; use for example --tokens 1,64,2048")
    return counts


def _problems_of(args: argparse.Namespace, tokens: Sequence[int]) -> list[GemmProblem]:
    from phalanx.checkpoints.config_files import read_config
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.runtime.models.registry import find_model

    raw = read_config(ModelDirectory.at(args.model))
    model = find_model(raw)
    config = model.read_config(raw)
    dtype = config.compute_dtype(args.dtype)
    return list(gemm_problems(model, config, args.tp, dtype, tokens))


def _open_tuner() -> tuple[GemmTimings, GemmTuner]:
    from phalanx.kernels.gemm_tuner import open_tuner
    from phalanx.runtime.executors.cuda.build import select_device

    select_device()
    return open_tuner()


def _table(timings: GemmTimings, rows: Sequence[dict[str, Any]]) -> str:
    width = max((len(row["problem"]) for row in rows), default=7)
    lines = [f"{timings.path}: {len(rows)} products", f"{'problem':<{width}}  {'us':>9}  {'first':>9}  kernel"]
    lines += [
        f"{row['problem']:<{width}}  {row['microseconds']:9.1f}  {row['first_microseconds']:9.1f}  {row['kind']}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
