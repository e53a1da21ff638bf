# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.build``: make one TensorRT engine per rank, ahead of serving. Needs no MPI."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.launch.arguments import (
    CommandParser,
    add_model_argument,
    add_model_file_argument,
    own_arguments,
    run_command,
)
from phalanx.launch.progress import Progress

if TYPE_CHECKING:
    from phalanx.checkpoints.checkpoint import Checkpoint
    from phalanx.parallel.topology import Layout
    from phalanx.runtime.executors.tensorrt.builder import BuildReport, BuildRequest
    from phalanx.runtime.executors.tensorrt.builder import Progress as BuildProgress
    from phalanx.runtime.executors.tensorrt.library import TensorRT

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.build")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.build",
        description="Make one TensorRT engine per rank. Ranks are built one after the other; start one process per --rank "
        "to build them side by side.",
    )
    parser.add_argument(
        "--engine", choices=("tensorrt",), default="tensorrt", help="engine to build; the others need no build"
    )
    add_model_argument(
        parser,
        "Hugging Face directory, ORG/NAME in its cache, or output of phalanx split (default: the demo checkpoint)",
    )
    add_model_file_argument(parser)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto",
                        help="dummy: seeded random weights, config.json suffices")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of dummy weights")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the engines")
    for short, long in (("tp", "tensor"), ("pp", "pipeline")):
        parser.add_argument(f"--{long}-parallel-size", f"--{short}", dest=short, type=int, default=1, metavar="N",
                            help=f"{long}-parallel size (default: 1)")  # fmt: skip
    parser.add_argument("--rank", type=int, metavar="R", help="build only this rank's engine (default: all)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute type; auto: the checkpoint's own",
    )
    parser.add_argument("--quantize", choices=("none", "fp8", "int8"), default="none",
                        help="quantise float weights of layers and their inputs; start with the same flag")  # fmt: skip
    _add_size_arguments(parser)
    parser.add_argument("--target-compute-capability", type=_capabilities, metavar="8.0,8.9",
                        help="GPUs to build for (default: the one here)")  # fmt: skip
    parser.add_argument("--stripped", action="store_true",
                        help="leave the weights out: one engine for all checkpoints of this shape, filled in when loaded")  # fmt: skip
    parser.no_effect("without --load-format dummy; add that", lambda args: args.load_format != "dummy", "--seed")
    return parser


def _add_size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N",
                        help="maximum number of sequences that run at once (default: 64)")  # fmt: skip
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS",
                        help="maximum length of prompt + output (default: the model's, at most 4096)")  # fmt: skip
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, metavar="N",
                        help="maximum length of a prompt chunk (default: 2048)")  # fmt: skip


def _capabilities(text: str) -> tuple[str, ...]:
    """``8.0,8.9 -> ("8.0", "8.9")``."""
    capabilities = tuple(part.strip() for part in text.split(","))
    for capability in capabilities:
        major, _, minor = capability.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise argparse.ArgumentTypeError(f"{capability!r} is not a compute capability like 8.9")
    return capabilities


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints the path of each engine built, one a line."""
    args = own_arguments(build_parser(), argv)

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.parallel.topology import Layout, Topology
    from phalanx.runtime.executors.tensorrt.builder import build_engine
    from phalanx.runtime.executors.tensorrt.engine_directory import EngineDirectory, identify
    from phalanx.runtime.executors.tensorrt.installed import load_tensorrt

    layout = Layout(tp=args.tp, pp=args.pp)
    ranks = [Topology(layout, rank) for rank in _ranks(args, layout)]
    library = load_tensorrt()
    with open_checkpoint(args.model, args.load_format, args.seed) as checkpoint:
        request = _request(args, checkpoint, library)
        directory = EngineDirectory.of(args.output, checkpoint.path)
        identity = identify(checkpoint, request, layout, library)
        if stale := directory.prepare(identity):
            _LOG.info("removed %d engine(s) of an earlier build from %s", len(stale), args.output)
        _LOG.info(_plan_line(request, library))
        for topology in ranks:
            path = directory.engine(identity, topology.rank)
            with Progress(path.name, None, "steps") as progress:
                report = build_engine(
                    library, request, checkpoint.source, topology, path, directory.timing_cache, _shown(progress, path)
                )
            _LOG.info(_report_line(path, report))
            sys.stdout.write(f"{path}\n")
    return 0


def _ranks(args: argparse.Namespace, layout: Layout) -> Sequence[int]:
    from phalanx.parallel.errors import ConfigError

    if args.rank is None:
        return range(layout.world_size)
    if not 0 <= args.rank < layout.world_size:
        raise ConfigError(
            f"--rank {args.rank} is outside 0..{layout.world_size - 1} of tp={layout.tp} x pp={layout.pp}; leave --rank out "
            "to build all ranks"
        )
    return (args.rank,)


def _request(args: argparse.Namespace, checkpoint: Checkpoint, library: TensorRT) -> BuildRequest:
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.executors.tensorrt.builder import BuildRequest, check_model, network_shape
    from phalanx.runtime.executors.tensorrt.formats import check_formats, check_stripped, network_weights, notes
    from phalanx.runtime.models import find_model
    from phalanx.runtime.models.tied import with_stored_head
    from phalanx.runtime.models.user_file import model_from_file

    if args.stripped and not (library.can_refit or library.computes_segments):
        raise ConfigError(f"--stripped is not supported by {library.name}; leave it out, or install tensorrt")
    model = find_model(checkpoint.config, model_from_file(args.model_file))
    config = with_stored_head(model, model.read_config(checkpoint.config), checkpoint.source)
    shape = network_shape(
        config,
        args.dtype,
        args.max_num_seqs,
        args.max_model_len,
        args.max_num_batched_tokens,
        library.computes_segments,
    )
    targets = args.target_compute_capability or library.default_targets()
    library.check_targets(targets)
    check_model(library, model, config, shape.dtype)
    weights = network_weights(model, config, checkpoint.formats, args.quantize)
    check_formats(library, config, weights, targets)
    if args.stripped:
        check_stripped(weights)
    for note in notes(weights, checkpoint.formats, shape.dtype):
        _LOG.info(note)
    stripped = args.stripped or library.computes_segments
    return BuildRequest(model, config, shape, targets, stripped, checkpoint.formats, args.quantize)


def _plan_line(request: BuildRequest, library: TensorRT) -> str:
    shape = request.shape
    start = f"{request.config.architecture} {shape.dtype} with {library.name} for compute capability {', '.join(request.targets)}: "
    if library.computes_segments:
        return (
            f"{start}segments for up to {shape.max_num_seqs} sequences and {shape.max_prefill_tokens} tokens in a step"
        )
    return (
        f"{start}{shape.max_num_seqs} sequences of up to {shape.max_model_len} tokens, prompt chunks of up to "
        f"{shape.max_prefill_tokens}"
    )


def _report_line(path: Path, report: BuildReport) -> str:
    end = f"peak host memory {report.peak_bytes / 1e9:.2f} GB"
    if not report.shard_bytes:
        return (
            f"{path.name}: {report.num_segments} segments of {report.num_layers} layers in all, without weights, built in "
            f"{report.build_seconds:.1f} s, {report.engine_bytes / 1e6:.1f} MB, {end}"
        )
    return (
        f"{path.name}: {report.num_layers} layers, shard {report.shard_bytes / 1e9:.3f} GB read in {report.load_seconds:.1f} s, "
        f"built in {report.build_seconds:.1f} s, engine {report.engine_bytes / 1e9:.3f} GB, {end}"
    )


def _shown(progress: Progress, path: Path) -> BuildProgress:
    """The library's phases, the outermost first."""

    def show(phase: str, step: int, num_steps: int) -> None:
        progress.show(step, num_steps or None, f"{path.name}: {phase}")

    return show


if __name__ == "__main__":
    run_command(main)
