"""``python -m launch.quantize``: a float checkpoint as fp8, int8 or 4-bit weights in compressed-tensors."""

from __future__ import annotations

import json
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
    from phalanx.runtime.models import Model

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.quantize")


def build_parser() -> CommandParser:
    """Flags as in INTERFACES, as far as there are methods."""
    parser = CommandParser(
        prog="launch.quantize",
        description="Quantise the matrices of a float checkpoint's layers by rounding to nearest, one at a time. The result is in "
        "compressed-tensors, the format of transformers and vLLM, and loads here; loading it there has not been tried.",
    )
    add_model_argument(parser, "Hugging Face directory with float weights (default: the demo checkpoint)")
    add_model_file_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--scheme", choices=("fp8", "int8", "w8a16", "w4a16"), required=True,
                        help="fp8, int8: weights by row, inputs by token; w8a16, w4a16: weights only")  # fmt: skip
    parser.add_argument("--method", choices=("rtn",), default="rtn", help="rtn: round to nearest")
    parser.add_argument("--group-size", type=int, default=None, metavar="N",
                        help="columns that share a scale; 0 = the row (default: 128 for w4a16, else 0)")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE", help="write each weight's relative error as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, comm = job_arguments(build_parser(), argv)

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.checkpoints.quantization.writer import Scheme, write_quantized
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.models.user_file import model_from_file

    if comm.size > 1:
        raise ConfigError(f"launch.quantize was started on {comm.size} ranks; it needs one")
    group_size = args.group_size if args.group_size is not None else 128 if args.scheme == "w4a16" else 0
    scheme = Scheme(args.scheme, group_size)
    with open_checkpoint(args.model) as checkpoint:
        chosen = _matrices(checkpoint, model_from_file(args.model_file))
        with Progress("quantizing", len(chosen), "matrices") as progress:
            errors = write_quantized(
                checkpoint.source, checkpoint.path, checkpoint.config, chosen, scheme, args.output,
                lambda name: progress.advance(name in chosen),
            )  # fmt: skip
    largest = max(errors, key=errors.__getitem__)
    _LOG.info(
        "%s: %d matrices as %s; relative error %.4f on average, %.4f at most (%s)",
        args.output, len(errors), args.scheme, sum(errors.values()) / len(errors), errors[largest], largest,
    )  # fmt: skip
    if args.report is not None:
        args.report.write_text(
            json.dumps({"scheme": args.scheme, "group_size": group_size, "errors": errors}, indent=1)
        )
    comm.close()
    return 0


def _matrices(checkpoint: Checkpoint, own: Model | None) -> set[str]:
    """Names of the tensors to quantise: whole matrices of layers, as the model declares them."""
    from phalanx.checkpoints.formats import DENSE
    from phalanx.checkpoints.quantization.held import quantized_while_loading
    from phalanx.checkpoints.resolve import resolve
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.models.registry import find_model

    model = find_model(checkpoint.config, own)
    specs = model.weights(model.read_config(checkpoint.config))
    if any(checkpoint.formats.choose(spec) != DENSE for spec in filter(quantized_while_loading, specs)):
        raise ConfigError("--model is quantised already; use the checkpoint that it was made from")
    stored = resolve(checkpoint.source, specs, (*model.ignored_tensors, r"lm_head\.weight"))
    chosen = set()
    for spec in filter(quantized_while_loading, specs):
        for part in spec.parts:
            if part.transposed or part.source_rows:
                raise ConfigError(
                    f"{part.source} is stored transposed, or several matrices in one; compressed-tensors has no such modules: "
                    "use --quantize fp8 when serving"
                )
            chosen.add(stored[part.source])
    return chosen


if __name__ == "__main__":
    run_command(main)
