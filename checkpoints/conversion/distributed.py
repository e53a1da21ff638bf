# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints of Megatron-core: whole tensors in pieces, wherever the ranks lay that saved them.

``torch_dist``: ``.metadata`` lists each tensor's pieces, which lie in ``*.distcp`` files. ``zarr``: a folder for each tensor, with
``.zarray`` and a file for each piece. Both name the layers' tensors once and stack them along a first axis.

Source: ``torch/distributed/checkpoint/{metadata,filesystem}.py`` of PyTorch; ``megatron/core/dist_checkpointing/strategies`` of Megatron-LM;
version 2 of Zarr's specification.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from phalanx.checkpoints.conversion.files import Files
from phalanx.checkpoints.conversion.inert_pickle import Inert, read_inert
from phalanx.checkpoints.conversion.megatron import canonical_name
from phalanx.checkpoints.conversion.torch_file import array_of, read_torch_file
from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["distributed_folder", "read_common", "read_distributed"]

METADATA, ZARRAY = ".metadata", ".zarray"
_OTHERS = re.compile(r"(optimizer|chained_\d+\.|rng_state|rerun_state|opt_param_scheduler).*")
"""Names of what is no weight of the model."""
_STACKED = re.compile(r"(?:decoder|encoder)\.layers\.(?!\d)(.+)")
_WHOLE_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


def distributed_folder(files: Files) -> str | None:
    """The folder of ``files`` that holds a distributed checkpoint, with a ``/`` at its end; empty = the files themselves are one.

    None: there is none.

    Raises:
        ConfigError: there are several.
    """
    places = [PurePosixPath(name) for name in files.names()]
    folders = {place.parent for place in places if place.name == METADATA or _is_sharded(files, place)}
    folders |= {place.parent.parent for place in places if place.name == ZARRAY}
    if not folders:
        return None
    first, *others = sorted(folders, key=lambda folder: (len(folder.parts), str(folder)))
    if others and len(others[0].parts) == len(first.parts):
        raise ConfigError(f"{first} and {others[0]} are both distributed checkpoints; name one of them")
    return "" if first == PurePosixPath() else f"{first}/"


def _is_sharded(files: Files, place: PurePosixPath) -> bool:
    if place.name != "metadata.json":
        return False
    with files.open(str(place)) as file:
        return b"sharded_backend" in file.read(4096)


def read_common(files: Files, folder: str) -> Mapping[str, Any]:
    """Return ``common.pt``: what all ranks hold alike, Megatron-LM's arguments among it; empty where it is missing."""
    name = f"{folder}common.pt"
    if name not in files.names():
        return {}
    with files.open(name) as file:
        common: Mapping[str, Any] = read_torch_file(file, name)
    return common


def read_distributed(files: Files, folder: str, vocab_size: int) -> dict[str, Array]:
    """Read the model's tensors, whole, under Megatron's names. ``vocab_size``: rows to keep of the vocabulary; 0 = all.

    Raises:
        CheckpointError: a tensor is unknown, or a piece is missing or damaged.
        ConfigError: pieces are compressed.
    """
    read = _torch_dist if f"{folder}{METADATA}" in files.names() else _zarr
    tensors: dict[str, Array] = {}
    for name, value in read(files, folder):
        for plain, part in _layers(re.sub(r"^(model|module)\.", "", name), value):
            if (new := canonical_name(plain, 0)) is not None:
                tensors[new] = part[: vocab_size or None] if new.endswith(_WHOLE_VOCABULARY) else part
    return tensors


def _layers(name: str, value: Array) -> Iterator[tuple[str, Array]]:
    """A tensor that stands for one of each layer, as those."""
    if (stacked := _STACKED.fullmatch(name)) is None:
        yield name, value
        return
    for layer, part in enumerate(value):
        yield f"decoder.layers.{layer}.{stacked[1]}", part


@contextlib.contextmanager
def _described_by(place: str) -> Iterator[None]:
    """Whatever is missing from the description of tensors ``place``, or is of another kind there, is the fault of that file."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{place} does not describe tensors as Megatron-core saves them ({type(error).__name__}: {error}); copy it again"
        ) from None


def _torch_dist(files: Files, folder: str) -> Iterator[tuple[str, Array]]:
    names = set(files.names())
    with _described_by(f"{folder}{METADATA}"):
        with files.open(f"{folder}{METADATA}") as file:
            metadata = read_inert(file.read(), f"{folder}{METADATA}").state
        pieces: dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]] = {}
        for index, where in metadata["storage_data"].items():
            place = index.state.get("offset")
            pieces.setdefault(index.state["fqn"], []).append((_numbers(place), where.state))
        for name, described in metadata["state_dict_metadata"].items():
            if described.name.endswith(".TensorStorageMetadata") and not _OTHERS.match(name):
                parts = ((start, _piece(files, names, folder, name, where)) for start, where in pieces.get(name, ()))
                yield name, _joined(name, _numbers(described.state["size"]), parts)


def _numbers(value: Any) -> tuple[int, ...]:
    """A ``torch.Size``; None = that of a number."""
    return tuple(value.arguments[0]) if isinstance(value, Inert) else tuple(value or ())


def _joined(name: str, shape: tuple[int, ...], parts: Iterable[tuple[tuple[int, ...], Array]]) -> Array:
    """One tensor of its parts by where each begins, taken one at a time."""
    whole: Array | None = None
    held = 0
    for start, part in parts:
        whole = np.empty(shape, part.dtype) if whole is None else whole
        box = tuple(slice(low, low + size) for low, size in zip(start or (0,) * len(shape), part.shape, strict=True))
        if whole[box].shape != part.shape:
            raise CheckpointError(
                f"a piece of {name} lies at {start}, beyond its shape {shape}; the pieces do not belong together"
            )
        whole[box] = part
        held += part.size
    if whole is None or held != math.prod(shape):
        raise CheckpointError(
            f"the pieces of {name} hold {held} of its {math.prod(shape)} values; restore the missing files"
        )
    return whole


def _piece(files: Files, names: set[str], folder: str, name: str, where: Mapping[str, Any]) -> Array:
    """One tensor within a file of many."""
    place = f"{folder}{where['relative_path']}"
    if where.get("transform_descriptors"):
        raise ConfigError(f"{place} is compressed; save the checkpoint again without")
    if place not in names:
        raise CheckpointError(f"{place} is missing, which holds a piece of {name}; restore it")
    with files.open(place) as file:
        file.seek(where["offset"])
        content = file.read(where["length"])
    if len(content) != where["length"]:
        raise CheckpointError(f"{place} is cut off: it ends within a piece of {name}; copy it again")
    return array_of(read_torch_file(io.BytesIO(content), place))


def _zarr(files: Files, folder: str) -> Iterator[tuple[str, Array]]:
    names = set(files.names())
    for place in sorted(name for name in names if name.startswith(folder) and name.endswith(f"/{ZARRAY}")):
        name = place.removeprefix(folder).removesuffix(f"/{ZARRAY}")
        if _OTHERS.match(name) or "/" in name:
            continue
        with _described_by(place):
            with files.open(place) as file:
                described = json.load(file)
            if described.get("compressor") or described.get("filters") or described.get("order", "C") != "C":
                raise ConfigError(
                    f"{place}: the pieces are compressed or not in C order; save the checkpoint again as torch_dist"
                )
            yield name, _chunked(files, names, place.removesuffix(ZARRAY), described)


def _chunked(files: Files, names: set[str], folder: str, described: Mapping[str, Any]) -> Array:
    shape, chunks = tuple(described["shape"]), tuple(described["chunks"])
    dtype = FLOAT_DTYPES["BF16"] if described["dtype"] == "bfloat16" else np.dtype(described["dtype"])
    separator, whole = described.get("dimension_separator", "."), np.empty(shape, dtype)
    for index in itertools.product(*(range(-(-size // each)) for size, each in zip(shape, chunks, strict=True))):
        place = folder + (separator.join(map(str, index)) or "0")
        if place not in names:
            raise CheckpointError(f"{place} is missing; restore it")
        with files.open(place) as file:
            content = file.read()
        if len(content) != math.prod(chunks) * dtype.itemsize:
            raise CheckpointError(
                f"{place} has {len(content)} bytes, but a piece takes {math.prod(chunks) * dtype.itemsize}"
            )
        box = tuple(slice(low * each, (low + 1) * each) for low, each in zip(index, chunks, strict=True))
        inside = tuple(slice(0, size) for size in whole[box].shape)  # the last pieces are padded
        whole[box] = np.frombuffer(content, dtype).reshape(chunks)[inside]
    return whole
