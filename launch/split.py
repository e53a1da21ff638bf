# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.split``: write one weight shard per rank, loadable at any layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.launch.arguments import (
    CommandParser,
    add_model_argument,
    add_model_file_argument,
    job_arguments,
    run_command,
)
from phalanx.launch.progress import Progress

if TYPE_CHECKING:
    from phalanx.checkpoints.checkpoint import Checkpoint
    from phalanx.checkpoints.split_plan import SplitJob
    from phalanx.checkpoints.splitter import SplitReport
    from phalanx.parallel.topology import Layout
    from phalanx.runtime.models import Model

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.split")
_STORED = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.split",
        description="Write one safetensors file per rank and a manifest. The result loads at any valid layout. "
        "Under mpirun, ranks share the work.",
    )
    add_model_argument(parser, "Hugging Face directory or an earlier split (default: the demo checkpoint)")
    add_model_file_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not exist")
    for short, long in (("tp", "tensor"), ("pp", "pipeline")):
        parser.add_argument(f"--{long}-parallel-size", f"--{short}", dest=short, type=int, default=1, metavar="N",
                            help=f"{long}-parallel size that the files are made for (default: 1)")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(_STORED), default="auto", help="convert weights (default: keep)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, comm = job_arguments(build_parser(), argv)

    import time

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.checkpoints.splitter import split_checkpoint
    from phalanx.parallel.topology import Layout
    from phalanx.runtime.models.user_file import shared_model

    start = time.perf_counter()
    with open_checkpoint(args.model) as checkpoint:
        job = _job(checkpoint, Layout(tp=args.tp, pp=args.pp), args.dtype, shared_model(args.model_file, comm))
        directory = ModelDirectory.at(checkpoint.path)
        # Ranks have equal shares, so the first one's shows how far all are.
        with Progress("splitting", None, "pieces", shown=comm.rank == 0) as progress:
            report = split_checkpoint(
                checkpoint.source, directory, job, args.output, comm, _threads(),
                lambda done, total: progress.show(done, total, "splitting"),
            )  # fmt: skip
    if comm.rank == 0:
        _report(report, args.output, time.perf_counter() - start)
    comm.close()
    return 0


def _job(checkpoint: Checkpoint, layout: Layout, dtype: str, own: Model | None) -> SplitJob:
    """What to write, from the model's own declaration of its weights."""
    from phalanx.checkpoints.resolve import check_unread
    from phalanx.checkpoints.split_plan import SplitJob, stored_weights
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.shapes import use_of
    from phalanx.runtime.models.tied import with_stored_head

    model, formats = find_model(checkpoint.config, own), checkpoint.formats
    config = model.read_config(checkpoint.config)
    use_of(model, config)  # a split of wrong declarations would be wrong for good
    config = with_stored_head(model, config, checkpoint.source)
    last, divided = layout.pp - 1, model.stages(config, layout.pp)
    weights = [model.weights(config, layers, stage == 0, stage == last) for stage, layers in enumerate(divided)]
    stages = tuple(stored_weights(checkpoint.source, specs, formats) for specs in weights)
    ignored = (*model.ignored_tensors, *formats.not_used)
    if formats.unread:
        everything = [spec for stage in stages for spec in stage]
        check_unread(checkpoint.source, everything, ignored, formats.unread)
    return SplitJob(model.architecture, stages, layout.tp, ignored, _STORED[dtype], model.code, divided)


def _report(report: SplitReport, output: Path, seconds: float) -> None:
    if report.replaced_leftovers:
        _LOG.info("replaced what an interrupted split had left in %s.partial", output)
    gigabytes = report.num_bytes / 1e9
    speed = gigabytes / seconds
    _LOG.info("%s: %d file(s), %.3f GB in %.1f s (%.2f GB/s)", output, report.num_files, gigabytes, seconds, speed)


def _threads() -> int:
    """This rank's share of the processors; more than four do not help."""
    import os

    from phalanx.parallel.launcher import launch_info

    return max(1, min(4, len(os.sched_getaffinity(0)) // launch_info().local_size))


if __name__ == "__main__":
    run_command(main)
