# SPDX-License-Identifier: Apache-2.0
"""The directory that Megatron-LM's ranks save, read into one model."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phalanx.checkpoints.conversion.distributed import distributed_folder, read_common, read_distributed
from phalanx.checkpoints.conversion.files import Directory, Files
from phalanx.checkpoints.conversion.megatron import MegatronLayout, canonical_name, config_of, join_pieces
from phalanx.checkpoints.conversion.torch_file import array_of, flat, read_torch_file
from phalanx.checkpoints.conversion.whole import WholeModel, config_dtype
from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["INTERLEAVED", "by_stage", "join_stages", "read_megatron", "refuse_interleaved", "whole_model"]

FILE = "model_optim_rng.pt"
TABLE, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
INTERLEAVED = "virtual_pipeline_model_parallel_size"
_NEEDED = ("hidden_size", "num_layers", "num_attention_heads", "max_position_embeddings")
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")


def read_megatron(directory: Path, vocab_size: int) -> WholeModel:
    """Join ``mp_rank_*/model_optim_rng.pt`` below ``directory``, or below the iteration that it names as its latest; or read the
    distributed checkpoint there.

    ``vocab_size``: rows to keep of the vocabulary; 0 = all.

    Raises:
        ConfigError: a rank is missing, or the model is of a kind that is not supported.
        CheckpointError: the files are damaged or do not belong together.
    """
    iteration = Directory(_iteration(directory))
    if (folder := distributed_folder(iteration)) is not None:
        return _read_core(iteration, folder, directory, vocab_size)
    stages = _stages(_iteration(directory))
    first = read_torch_file(stages[0][0], str(stages[0][0]))
    arguments = _arguments_in(first, str(stages[0][0]))
    refuse_interleaved(arguments)
    heads = arguments["num_attention_heads"]
    groups = arguments["num_query_groups"] if arguments.get("group_query_attention") else heads
    version = float(first.get("checkpoint_version", 0))
    layout = MegatronLayout(version, heads, groups, bool(arguments.get("swiglu")), vocab_size)
    pieces = ([_model_in(path) for path in ranks] for ranks in stages)
    return whole_model(join_stages(pieces, layout), arguments)


def _read_core(files: Files, folder: str, directory: Path, vocab_size: int) -> WholeModel:
    """A distributed checkpoint, whose ``common.pt`` holds the arguments."""
    common = read_common(files, folder)
    if "args" not in common:
        raise ConfigError(
            f"{directory} is a distributed checkpoint without Megatron-LM's arguments in common.pt; if NeMo 2 wrote it, give --from nemo "
            "the directory of its context/ and weights/, else restore common.pt"
        )
    return whole_model(read_distributed(files, folder, vocab_size), _arguments_in(common, f"{directory}'s common.pt"))


def whole_model(tensors: dict[str, Array], arguments: Mapping[str, Any]) -> WholeModel:
    """Return the model of ``tensors``, trained with Megatron's ``arguments``.

    Raises:
        CheckpointError: they are not of that model.
        ConfigError: as `config_of`.
    """
    num_layers = 1 + max((int(name.split(".")[3]) for name in tensors if ".layers." in name), default=-1)
    if num_layers != arguments["num_layers"]:
        raise CheckpointError(f"the pieces hold {num_layers} layers, but the model has {arguments['num_layers']}")
    if TABLE not in tensors:
        raise CheckpointError(f"the pieces lack {TABLE}; restore the first pipeline stage's")
    if not arguments.get("untie_embeddings_and_output_weights"):
        tensors.pop(HEAD, None)
    return WholeModel(tensors, config_of(arguments, len(tensors[TABLE]), config_dtype(tensors[TABLE])))


def refuse_interleaved(arguments: Mapping[str, Any]) -> None:
    """Refuse ranks' own files whose layers do not follow one another; a distributed checkpoint names layers over all ranks.

    Raises:
        ConfigError: each rank held several stages of the pipeline.
    """
    if chunks := arguments.get(INTERLEAVED):
        raise ConfigError(
            f"{INTERLEAVED}={chunks} interleaves the layers of the ranks' files, which cannot be joined; save the checkpoint "
            "again as a distributed one (torch_dist) or without"
        )


def join_stages(stages: Iterable[Sequence[Mapping[str, Any]]], layout: MegatronLayout) -> dict[str, Array]:
    """Join what the ranks of each pipeline stage hold, whose layers each stage counts from 0. Takes one stage at a time.

    Raises:
        CheckpointError: a tensor is unknown, or ranks hold different ones.
    """
    tensors: dict[str, Array] = {}
    num_layers = 0
    for states in stages:
        ranks = [dict(_named(state, num_layers)) for state in states]
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise CheckpointError("the pieces are of different models; the ranks' tensors differ")
        for name in ranks[0]:
            tensors.setdefault(name, join_pieces(name, [rank[name] for rank in ranks], layout))
        num_layers = 1 + max((int(name.split(".")[3]) for name in tensors if ".layers." in name), default=-1)
    return tensors


def by_stage(found: Mapping[tuple[int, int], str], what: str) -> list[list[str]]:
    """Sort names of files by pipeline stage, then by tensor-parallel rank; ``found`` has them by (stage, rank).

    Raises:
        ConfigError: a rank is missing; ``what`` was looked for.
    """
    stages, ranks = (1 + max((place[axis] for place in found), default=0) for axis in (0, 1))
    missing = [(stage, rank) for stage in range(stages) for rank in range(ranks) if (stage, rank) not in found]
    if missing:
        raise ConfigError(
            f"{what} for every rank was not found: tensor-parallel rank {missing[0][1]} of pipeline stage {missing[0][0]} is "
            "missing; give the directory that holds all of them"
        )
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _arguments_in(state: Any, name: str) -> Mapping[str, Any]:
    """Megatron-LM's arguments, which the file ``name`` holds."""
    given = state.get("args") if isinstance(state, dict) else None
    arguments = vars(given) if isinstance(given, argparse.Namespace | types.SimpleNamespace) else {}
    needed = (*_NEEDED, *(("num_query_groups",) if arguments.get("group_query_attention") else ()))
    if missing := [key for key in needed if not isinstance(arguments.get(key), int)]:
        raise CheckpointError(
            f"{name} lacks {', '.join(missing)} among Megatron-LM's arguments; give a checkpoint that Megatron-LM itself saved"
        )
    return arguments


def _model_in(path: Path) -> Mapping[str, Any]:
    """One rank's tensors."""
    state: Any = read_torch_file(path, str(path))
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} holds no model of Megatron-LM under 'model'; copy the rank's file again")
    return model


def _iteration(directory: Path) -> Path:
    """The directory that holds the ranks' directories."""
    latest = directory / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return directory
    name = latest.read_text(errors="replace").strip()
    if not name.isdecimal() and name != "release":
        raise CheckpointError(
            f"{latest} holds {name[:40]!r}, but it is a number or 'release'; correct it, or give the iteration's directory"
        )
    return directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def _stages(directory: Path) -> list[list[Path]]:
    matches = [_RANK.fullmatch(path.name) for path in (directory.iterdir() if directory.is_dir() else ())]
    found = {
        (int(match[2] or 0), int(match[1])): match[0]
        for match in matches
        if match and (directory / match[0] / FILE).is_file()
    }
    names = by_stage(found, f"{directory}/mp_rank_00/{FILE} and so on")
    return [[directory / name / FILE for name in stage] for stage in names]


def _named(model: Mapping[str, Any], first_layer: int) -> Iterator[tuple[str, Array]]:
    """A piece's tensors by their names, as arrays."""
    for name, tensor in flat(model):
        if (new := canonical_name(name, first_layer)) is not None:
            yield new, array_of(tensor)
