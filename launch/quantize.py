# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.quantize``: a float checkpoint as fp8, int8 or 4-bit weights in compressed-tensors."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_model_argument,
    add_model_file_argument,
    job_arguments,
    path_or_stream,
    run_command,
)
from phalanx.launch.progress import Progress
from phalanx.launch.sharing import STANDARD_STREAM, check_writable, read_text, require_one_rank

if TYPE_CHECKING:
    from phalanx.checkpoints.checkpoint import Checkpoint
    from phalanx.checkpoints.quantization.scheme import Scheme
    from phalanx.runtime.calibration.method import CalibratedMethod, OutputError
    from phalanx.runtime.models import Model

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.quantize")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.quantize",
        description="Quantise the matrices of a float checkpoint's layers, one layer at a time. The result is in "
        "compressed-tensors, the format of transformers and vLLM; it loads here and in transformers (docs/quantisation.md says which versions).",
    )
    add_model_argument(parser, "Hugging Face directory with float weights (default: the demo checkpoint)")
    add_model_file_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--scheme", choices=("fp8", "fp8-static", "int8", "w8a16", "w4a16"), required=True,
                        help="fp8, int8: weights by row, inputs by token; fp8-static: weights by row, inputs by a scale that the "
                        "calibration text gives; w8a16, w4a16: weights only")  # fmt: skip
    parser.add_argument("--method", choices=("rtn", "smoothquant", "awq", "gptq"), default="rtn",
                        help="rtn: round to nearest; smoothquant (fp8, fp8-static, int8): outliers of inputs move into weights; "
                        "awq (w8a16, w4a16): columns with large inputs get finer codes; "
                        "gptq (w8a16, w4a16): later columns make up for the rounding of earlier ones")  # fmt: skip
    parser.add_argument("--kv-cache", choices=("none", "fp8"), default="none",
                        help="fp8: write scales of an fp8 cache that the calibration text gives (default: none)")  # fmt: skip
    parser.add_argument("--calibration", type=path_or_stream, metavar="FILE",
                        help="UTF-8 text for smoothquant, awq, gptq, fp8-static and --kv-cache, or - for standard input, of which the first 32,768 tokens count (default: sources of Phalanx)")  # fmt: skip
    parser.add_argument("--group-size", type=int, default=None, metavar="N",
                        help="columns that share a scale; 0 or -1 = the row (default: 128 for w4a16, else 0)")  # fmt: skip
    parser.add_argument(
        "--report",
        type=path_or_stream,
        metavar="FILE",
        help="write each weight's relative error, and with a calibration its output's before and after, as JSON; - is standard output",
    )
    parser.no_effect(
        "without another --method, --scheme fp8-static or --kv-cache fp8; add one of them",
        _reads_no_text,
        "--calibration",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, comm = job_arguments(build_parser(), argv)

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.checkpoints.quantization.finite import FiniteSource
    from phalanx.checkpoints.quantization.scheme import Scheme
    from phalanx.checkpoints.quantization.writer import RoundToNearest, write_quantized
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.calibration.text import MAX_BYTES
    from phalanx.runtime.models.user_file import model_from_file

    require_one_rank(comm, "phalanx quantize")
    group_size = args.group_size if args.group_size is not None else 128 if args.scheme == "w4a16" else 0
    group_size = 0 if group_size == -1 else group_size  # compressed-tensors' name for the row
    scheme = Scheme(args.scheme, group_size)
    if args.report not in (None, STANDARD_STREAM):
        check_writable(comm, "--report", args.report)
        if args.report.resolve() == args.output.resolve():
            raise ConfigError(f"--report {args.report} is the directory that --output makes; give another file")
        if args.report.exists() and args.report.resolve().parent == args.model.resolve():
            raise ConfigError(f"--report {args.report} is a file of the model; give another one")
    text = None if args.calibration is None else read_text(comm, "--calibration", args.calibration, MAX_BYTES)
    with open_checkpoint(args.model) as opened:
        own = model_from_file(args.model_file)
        stored, chosen, ignored = _matrices(opened, own)
        checkpoint = replace(opened, source=FiniteSource(opened.source, chosen))
        calibrated = None
        if not _reads_no_text(args):
            calibrated = _calibrated(args, text, scheme, checkpoint, own, stored, set(chosen))
        method = calibrated or RoundToNearest(scheme)
        with Progress("quantizing", len(chosen), "matrices") as progress:
            errors = write_quantized(
                checkpoint.source, checkpoint.path, checkpoint.config, chosen, ignored, scheme, method, args.output,
                lambda name: progress.advance(name in chosen),
            )  # fmt: skip
    largest = max(errors, key=errors.__getitem__)
    _LOG.info(
        "%s: %d matrices as %s; relative error %.4f on average, %.4f at most (%s)",
        args.output, len(errors), args.scheme, sum(errors.values()) / len(errors), errors[largest], largest,
    )  # fmt: skip
    report: dict[str, Any] = {"scheme": args.scheme, "method": args.method, "group_size": group_size, "errors": errors}
    if calibrated is not None:
        report["output_errors"] = {name: asdict(error) for name, error in calibrated.output_errors.items()}
        report |= {"input_ranges": calibrated.input_ranges, "cache_scales": calibrated.cache_scales}
    if args.method != "rtn" and calibrated is not None:
        _say(args.method, list(calibrated.output_errors.values()))
    if args.report is not None:
        _write(args.report, json.dumps(report, indent=1), args.output)
    comm.close()
    return 0


def _write(report: Path, text: str, output: Path) -> None:
    """Write ``report``, for which there was a place before the work.

    Raises:
        ConfigError: there is none now.
    """
    from phalanx.parallel.errors import ConfigError

    try:
        if report == STANDARD_STREAM:
            print(text)
        else:
            report.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"--report {report} cannot be written: {error.strerror}; {output} is complete without it"
        ) from None


def _reads_no_text(args: argparse.Namespace) -> bool:
    return bool(args.method == "rtn" and args.scheme != "fp8-static" and args.kv_cache == "none")


def _calibrated(
    args: argparse.Namespace, text: str | None, scheme: Scheme, checkpoint: Checkpoint, own: Model | None,
    stored: Mapping[str, str], chosen: set[str],
) -> CalibratedMethod:  # fmt: skip
    from phalanx.runtime.calibration.layers import LayerRuns
    from phalanx.runtime.calibration.method import CalibratedMethod, check_method
    from phalanx.runtime.calibration.text import calibration_windows, default_text
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.text import Tokenizer

    check_method(args.method, scheme)
    model = find_model(checkpoint.config, own)
    config = model.read_config(checkpoint.config)
    windows = calibration_windows(
        default_text() if text is None else text,
        Tokenizer.from_directory(checkpoint.path),
        config.max_positions,
        config.vocab_size,
    )
    runs = LayerRuns(checkpoint, model, config, windows)
    return CalibratedMethod(args.method, scheme, model, config, stored, chosen, runs, args.kv_cache == "fp8")


def _say(method: str, errors: Sequence[OutputError]) -> None:
    before, kept = (sum(each) / max(len(errors), 1) for each in ([e.rtn for e in errors], [e.written for e in errors]))
    _LOG.info(
        "%s: relative error of outputs %.4f on average instead of %.4f; %d of %d matrices are better rounded to nearest",
        method, kept, before, sum(not error.is_kept for error in errors), len(errors),
    )  # fmt: skip


def _matrices(checkpoint: Checkpoint, own: Model | None) -> tuple[dict[str, str], dict[str, bool], list[str]]:
    """Stored name of every declared tensor; the matrices to quantise; rules that name the modules which stay as they are.

    Matrices are whole stored ones, by their stored names, with whether they are stored ``[in, out]``.

    Raises:
        ConfigError: the model's functions are wrong, the checkpoint is quantised, or a stored matrix cannot be quantised as a whole.
    """
    from phalanx.checkpoints.formats import DENSE
    from phalanx.checkpoints.quantization.held import quantized_while_loading
    from phalanx.checkpoints.resolve import resolve
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.shapes import use_of

    model = find_model(checkpoint.config, own)
    config = model.read_config(checkpoint.config)
    use_of(model, config)
    specs = model.weights(config)
    if any(checkpoint.formats.choose(spec) != DENSE for spec in filter(quantized_while_loading, specs)):
        raise ConfigError("--model is quantised already; use the checkpoint that it was made from")
    stored = resolve(checkpoint.source, specs, (*model.ignored_tensors, r"lm_head\.weight"))
    chosen, plain = {}, set()
    for spec in specs:
        for part in spec.parts:
            if not quantized_while_loading(spec):
                plain.add(stored[part.source])
            elif part.encoding is not None or not stored[part.source].endswith(".weight"):
                raise ConfigError(
                    f"{part.source} is no plain matrix called .weight, which compressed-tensors needs; use --quantize fp8 when serving"
                )
            else:
                chosen[stored[part.source]] = part.transposed
    for name in sorted(plain & chosen.keys()):
        raise ConfigError(f"{name} holds matrices that stay as they are, too; use --quantize fp8 when serving")
    tables = {stored[part.source] for spec in specs if spec.owner in ("embed", "positions") for part in spec.parts}
    source = checkpoint.source
    others = {
        name for name in source.names()
        if name.endswith(".weight") and name not in chosen and name not in tables and len(source.info(name).shape) > 1
    }  # fmt: skip
    # By the names of classes, too: a base model's file leaves their beginning out.
    declared = {usual for usual, name in stored.items() if name in others}
    modules = [name.removesuffix(".weight") for name in sorted(others | declared)]
    return stored, chosen, _as_rules(modules, model.ignored_tensors)


def _as_rules(modules: Sequence[str], unread: Sequence[str]) -> list[str]:
    """``ignore`` of compressed-tensors for ``modules``; those of parts that the family does not read (an image encoder) by its patterns.

    Rules are about classes, and only the family's patterns know what a part may be called there: transformers 5 has
    ``model.vision_tower`` for ``vision_tower`` in the file.
    """
    patterns = [pattern for pattern in unread if any(re.match(pattern, module) for module in modules)]
    named = [module for module in modules if not any(re.match(pattern, module) for pattern in patterns)]
    return [*(f"re:{pattern}" for pattern in patterns), *named]


if __name__ == "__main__":
    run_command(main)
