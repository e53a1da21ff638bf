"""``python -m launch.convert``: a checkpoint of Megatron-LM as a directory that every command loads."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import CommandParser, job_arguments, run_command

if TYPE_CHECKING:
    from phalanx.checkpoints.megatron import MegatronLayout
    from phalanx.checkpoints.source import Array

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.convert")
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
FILE = "model_optim_rng.pt"


def build_parser() -> CommandParser:
    """Flags as in INTERFACES, as far as there are formats."""
    parser = CommandParser(
        prog="launch.convert",
        description="Join the pieces of a Megatron-LM GPT checkpoint (mp_rank_*/model_optim_rng.pt) into one directory. They are "
        "pickles: PyTorch, which must be installed, reads weights and plain values from them and runs nothing.",
    )
    parser.add_argument("--from", dest="source", choices=("megatron",), required=True, help="what wrote the checkpoint")
    parser.add_argument("--input", type=Path, required=True, metavar="DIR",
                        help="directory of the ranks' directories, or that of latest_checkpointed_iteration.txt")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="N",
                        help="tokens of the tokenizer; rows beyond are padding and left out (default: keep all)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, comm = job_arguments(build_parser(), argv)

    from phalanx.parallel.errors import ConfigError

    if comm.size > 1:
        raise ConfigError(f"launch.convert was started on {comm.size} ranks; it needs one")
    if args.output.exists():
        raise ConfigError(f"--output {str(args.output)!r} exists; remove it or choose another name")
    tensors, config = _converted(_stages(_iteration(args.input)), args.vocab_size)
    _write(tensors, config, args.output)
    _LOG.info("%s: %d tensors of %d layers", args.output, len(tensors), config["num_layers"])
    comm.close()
    return 0


def _iteration(directory: Path) -> Path:
    """The directory that holds the ranks' directories."""
    latest = directory / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return directory
    name = latest.read_text().strip()
    return directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def _stages(directory: Path) -> list[list[Path]]:
    """Files by pipeline stage, then by tensor-parallel rank."""
    from phalanx.parallel.errors import ConfigError

    found: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if match := _RANK.fullmatch(path.name):
            found.setdefault(int(match[2] or 0), {})[int(match[1])] = path / FILE
    sizes = {tuple(sorted(ranks)) for ranks in found.values()}
    complete = len(sizes) == 1 and sorted(found) == list(range(len(found))) and sizes == {tuple(range(len(found[0])))}
    if not complete or not all(path.is_file() for ranks in found.values() for path in ranks.values()):
        raise ConfigError(f"--input {str(directory)!r} does not hold mp_rank_00/{FILE} and so on for every rank")
    return [[path for _, path in sorted(found[stage].items())] for stage in sorted(found)]


def _converted(stages: list[list[Path]], vocab_size: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Whole tensors by name, and the ``config.json``."""
    from phalanx.checkpoints.dtypes import FLOAT_DTYPES
    from phalanx.checkpoints.megatron import config_of, join_pieces
    from phalanx.parallel.errors import CheckpointError

    tensors: dict[str, Array] = {}
    arguments: Mapping[str, Any] = {}
    num_layers = 0
    for files in stages:
        states = [_load(path) for path in files]
        arguments = vars(states[0]["args"])
        layout = _layout(arguments, float(states[0].get("checkpoint_version", 0)), vocab_size)
        ranks = [dict(_named(state["model"], num_layers)) for state in states]
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise CheckpointError(
                f"{files[0].parent.parent} holds pieces of different models; the ranks' tensors differ"
            )
        for name in ranks[0]:
            tensors.setdefault(name, join_pieces(name, [rank[name] for rank in ranks], layout))
        num_layers = 1 + max((int(name.split(".")[3]) for name in tensors if ".layers." in name), default=-1)
    if num_layers != arguments["num_layers"]:
        raise CheckpointError(f"the pieces hold {num_layers} layers, but the model has {arguments['num_layers']}")
    if not arguments.get("untie_embeddings_and_output_weights"):
        tensors.pop("language_model.output_layer.weight", None)
    table = tensors["language_model.embedding.word_embeddings.weight"]
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    spelling = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[names[table.dtype]]
    return tensors, config_of(arguments, len(table), spelling)


def _layout(arguments: Mapping[str, Any], version: float, vocab_size: int) -> MegatronLayout:
    from phalanx.checkpoints.megatron import MegatronLayout

    heads = arguments["num_attention_heads"]
    groups = arguments["num_query_groups"] if arguments.get("group_query_attention") else heads
    return MegatronLayout(version, heads, groups, bool(arguments.get("swiglu")), vocab_size)


def _load(path: Path) -> Any:
    """One rank's file. Of Megatron's own classes, objects that do nothing take the place."""
    from phalanx.parallel.errors import CheckpointError, ConfigError

    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ConfigError("launch.convert needs PyTorch to read pickles; install it (pip install torch)") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except ValueError:  # saved before PyTorch 1.6
        names = []
    stand_ins = [(type("StandIn", (_StandIn,), {}), name) for name in names if name.startswith("megatron.")]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip, torch
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{path} cannot be read as weights and plain values: {first}") from None


class _StandIn:
    """An object of a class of Megatron's, of which nothing is used."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass


def _named(model: Mapping[str, Any], first_layer: int) -> Iterator[tuple[str, Array]]:
    """A piece's tensors by their names, as arrays."""
    from phalanx.checkpoints.megatron import canonical_name

    for name, tensor in _flat(model, ""):
        if (new := canonical_name(name, first_layer)) is not None:
            yield new, _array(tensor)


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _array(tensor: Any) -> Array:
    """The same memory as a NumPy array, which has no bfloat16 of its own."""
    import ml_dtypes
    import numpy as np

    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    bits = tensor.view(importlib.import_module("torch").int16).numpy()
    return np.asarray(bits.view(ml_dtypes.bfloat16))


def _write(tensors: Mapping[str, Array], config: Mapping[str, Any], output: Path) -> None:
    """Weights, then ``config.json``, in a directory that gets its name at the end."""
    from phalanx.checkpoints.dtypes import FLOAT_DTYPES
    from phalanx.checkpoints.safetensors_layout import plan_file
    from phalanx.checkpoints.source import TensorInfo

    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    layout = [(name, TensorInfo(array.shape, names[array.dtype])) for name, array in sorted(tensors.items())]
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "model.safetensors", "wb") as file:
        file.write(plan_file(layout, {"format": "pt"}).header)
        for name, _ in layout:
            file.write(tensors[name].tobytes())
    given = {key: value for key, value in config.items() if value is not None}
    (partial / "config.json").write_text(json.dumps(given, indent=2) + "\n")
    partial.rename(output)


if __name__ == "__main__":
    run_command(main)
