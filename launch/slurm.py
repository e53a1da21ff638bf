# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.slurm``: a batch script for a model, refused before it waits in a queue if the job could not start."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    own_arguments,
    run_command,
)
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.parallel.topology import Layout

__all__ = ["main"]

_TIME = re.compile(r"(\d+-)?\d+(:[0-5]?\d){0,2}")
_DEFAULT_TIME = {"serve": "12:00:00", "generate": "02:00:00"}


def build_parser() -> CommandParser:
    """Return the command's parser: the job, then flags of model and engine, which the script hands on."""
    parser = CommandParser(
        prog="launch.slurm",
        description="Print a batch script in which every line says why it is there: phalanx slurm ... > job.sbatch. Needs "
        "config.json only. Site settings stay in slurm/settings.sh.",
    )
    group = parser.add_argument_group("job")
    group.add_argument("--run", choices=("serve", "generate"), default="serve", help="what the job does")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes, all alike")
    group.add_argument(
        "--gpus-per-node", type=_gpus_per_node, required=True, metavar="N", help="GPUs and ranks of each node"
    )
    group.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="processor cores of each rank")
    group.add_argument("--time", metavar="LIMIT",
                       help="time limit in Slurm's notation (default: serve 12:00:00, generate 02:00:00)")  # fmt: skip
    group.add_argument("--gpu-memory-gib", type=float, metavar="G", help="memory of one GPU (default: not checked)")
    add_parallel_arguments(parser, tp="the GPUs of a node", pp="all other ranks")
    add_model_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints the script."""
    from phalanx.checkpoints.config_files import demo_path
    from phalanx.launch.job_script import Job, render

    parser = build_parser()
    args = own_arguments(parser, argv)
    layout = _layout(args)
    model = _absolute(args.model or demo_path())
    options = _handed_on(parser, args)
    plan = _plan(args, layout, options)
    print(
        render(
            Job(
                command=args.run,
                model=model,
                nodes=args.nodes,
                gpus_per_node=args.gpus_per_node,
                layout=layout,
                cpus_per_task=args.cpus_per_task,
                time_limit=_time_limit(args.time or _DEFAULT_TIME[args.run]),
                options=tuple(word for words in options.values() for word in words),
                summary=(
                    f"Written by: {parser.command_line(argv)}",
                    _summary(plan),
                    "Submit it in the checkout: sbatch FILE",
                ),
            )
        ),
        end="",
    )
    return 0


def _gpus_per_node(text: str) -> int:
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is unequal nodes, but every node runs as many ranks as the others; give the smallest number"
        )
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")
    return int(text)


def _layout(args: argparse.Namespace) -> Layout:
    """The sizes given; else tensor-parallel inside a node, one or more pipeline stages a node.

    Raises:
        ConfigError: the sizes and the allocation differ, or a tensor-parallel group has ranks on a part of a node.
    """
    from phalanx.parallel.topology import Layout

    per_node = args.gpus_per_node
    for flag, count in (("nodes", args.nodes), ("gpus-per-node", per_node), ("cpus-per-task", args.cpus_per_task)):
        if count < 1:
            raise ConfigError(f"--{flag}={count} is below 1; one rank runs on each GPU of each node")
    ranks = args.nodes * per_node
    given = Layout(*(1 if size is None else size for size in (args.tp, args.pp, args.dp)))
    share = max(1, ranks // (given.dp * given.pp))
    tp = args.tp or (math.gcd(per_node, share) if args.pp is None else share)
    layout = Layout(tp, args.pp or max(1, share // tp), given.dp)
    if layout.world_size != ranks:
        raise ConfigError(
            f"dp={layout.dp} x pp={layout.pp} x tp={layout.tp} is {layout.world_size} rank(s), but --nodes={args.nodes} x "
            f"--gpus-per-node={per_node} is {ranks}; make them equal, or leave a size out"
        )
    if per_node % tp and tp % per_node:
        raise ConfigError(
            f"tp={tp} does not divide --gpus-per-node={per_node}, so tensor-parallel groups would share nodes with parts of "
            f"others; use tp={math.gcd(per_node, ranks)}, or --gpus-per-node={tp}"
        )
    return layout


def _handed_on(parser: CommandParser, args: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of model and engine that were given, each with its words. One with its default counts, too: the site's options may say otherwise."""
    own = {"model", "tp", "pp", "dp", "run", "nodes", "gpus_per_node", "cpus_per_task", "time", "gpu_memory_gib"}
    given = {}
    for flag, action in parser.flags().items():
        value = getattr(args, action.dest, None)
        if action.dest in own or flag in ("--config", "--log-level", "--log-format") or value is None:
            continue
        if not parser.is_given(action):
            continue
        given[flag] = (
            [flag] if action.nargs == 0 else [flag, _absolute(value) if isinstance(value, Path) else str(value)]
        )
    return given


def _plan(args: argparse.Namespace, layout: Layout, options: dict[str, list[str]]) -> dict[str, Any]:
    """What `launch.plan` says of this job.

    Raises:
        ConfigError: the model cannot be split so, or it does not fit.
        CheckpointError: ``config.json`` is missing or damaged.
    """
    from phalanx.launch import plan

    parser = plan.build_parser()
    known = [word for flag, words in options.items() if flag in parser.flags() for word in words]
    sizes = [f"--tp={layout.tp}", f"--pp={layout.pp}", f"--dp={layout.dp}"]
    model = [f"--model={args.model}"] if args.model else []
    memory = [f"--gpu-memory-gib={args.gpu_memory_gib}"] if args.gpu_memory_gib is not None else []
    result = plan.plan(parser.parse_args([*model, *sizes, *memory, *known]))
    if result["fits"] is False:
        raise ConfigError(
            f"{result['model']} does not fit: one sequence of {result['max_model_len']} tokens needs {_needs(result)}, "
            f"--gpu-memory-gib={args.gpu_memory_gib:g}; use more --nodes, or a smaller --max-model-len"
        )
    return result


def _summary(plan: dict[str, Any]) -> str:
    layout = f"dp {plan['dp']} x pp {plan['pp']} x tp {plan['tp']} = {plan['num_gpus']} GPU(s)"
    if plan["fits"]:
        memory = f"room for {plan['full_length_sequences']} sequence(s) of {plan['max_model_len']} tokens"
    else:
        memory = f"needs {_needs(plan)} (not checked: no --gpu-memory-gib)"
    return f"{plan['model']}, {plan['dtype']}, {layout}; {memory}"


def _needs(plan: dict[str, Any]) -> str:
    return f"GPUs of {plan['smallest_gpu_bytes'] / 2**30:.1f} GiB"


def _time_limit(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ConfigError(f"--time={text} is not a time of Slurm; write hours:minutes:seconds, or days-hours")
    return text


def _absolute(path: Path) -> str:
    """The path from the root if it exists; a name in the Hugging Face cache stays as it is."""
    return os.path.abspath(path) if path.exists() else str(path)


if __name__ == "__main__":
    run_command(main)
