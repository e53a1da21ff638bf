# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.check``: a model's functions and declarations, run on shapes before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phalanx.launch.arguments import (
    CommandParser,
    add_model_argument,
    add_model_file_argument,
    own_arguments,
    run_command,
)

if TYPE_CHECKING:
    from phalanx.runtime.config import ModelConfig
    from phalanx.runtime.models import Model

__all__ = ["main"]


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.check",
        description="Run a model's functions on shapes: each mistake is one sentence and exit status 2. config.json suffices. Then "
        "say for each engine what it lacks.",
    )
    add_model_argument(parser, "directory with config.json (default: the demo)")
    add_model_file_argument(parser)
    parser.add_argument("--against-transformers", action="store_true",
                        help="compare the model made small, with random weights, with transformers, which must be installed, torch too")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if transformers computes something else."""
    args = own_arguments(build_parser(), argv)

    from phalanx.checkpoints.config_files import demo_path, read_config
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file

    raw = read_config(ModelDirectory.at(args.model or demo_path()))
    model = find_model(raw, model_from_file(args.model_file))
    print("\n".join(check(model, model.read_config(raw))), flush=True)
    if not args.against_transformers:
        return 0

    from phalanx.launch.against_transformers import compare

    comparison = compare(raw, args.model_file)
    print(comparison.line)
    return 0 if comparison.is_equal else 1


def check(model: Model, config: ModelConfig) -> list[str]:
    """What the model is and which engines run it, a line each.

    Raises:
        ConfigError: a mistake in the family's functions or declarations.
    """
    from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA
    from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
    from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES as TENSORRT
    from phalanx.runtime.models.shapes import use_of

    use = use_of(model, config)
    operations = [feature.name for feature in use.features if "." not in feature.name]
    origin = f", sha256 {model.code}" if model.code else ""
    lines = [
        f"{model.architecture}{origin}: {config.num_layers} layers, {len(use.weights)} weights, all of them used",
        f"operations: {', '.join(operations)}",
    ]
    for engine in (NUMPY, CUDA, TENSORRT):
        dtype = "float32" if engine is NUMPY else config.dtype
        complaints = list(engine.complaints(model, config, dtype))
        lines.append(f"{engine.engine}: {'; '.join(complaints) or 'runs it'}")
    return lines


if __name__ == "__main__":
    run_command(main)
