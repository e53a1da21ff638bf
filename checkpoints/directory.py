# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a tensor source: one file, or shards with or without an index."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from phalanx.checkpoints.file_kinds import describe_directory
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import FORMAT
from phalanx.checkpoints.resolve import list_names
from phalanx.checkpoints.safetensors_file import SafetensorsFile
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo
from phalanx.parallel.errors import CheckpointError

__all__ = ["INDEX_FILE", "DirectorySource"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_OTHER_WEIGHTS = ("adapter_", "consolidated")
"""Beginnings of names of files that are no part of a model, or hold it once more under the names of its authors."""

_SHARD = re.compile(r"(?P<stem>.+-)(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class DirectorySource:
    """Tensors of all files of a directory; every header is verified when it is made.

    An index only says which files belong together; what they hold, their own headers say.

    Raises:
        CheckpointError: no files, a missing shard, a tensor in two files.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            for name in _choose_files(directory):
                self._add(SafetensorsFile(directory, name))
        except BaseException:
            self.close()
            raise

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._home.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape and stored format."""
        return self._home[name].tensors[name].info

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        """As `TensorSource.read`."""
        return self._home[name].read(name, index, buffer)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def _add(self, file: SafetensorsFile) -> None:
        self._files.append(file)
        if file.metadata.get("format") == FORMAT:
            raise CheckpointError(
                f"{file.name!r} is one rank's file of a split without its manifest.json: the split was interrupted or "
                "copied in part; run phalanx split again"
            )
        if twice := file.tensors.keys() & self._home.keys():
            name = min(twice)
            raise CheckpointError(
                f"tensor {name[:120]!r} is in {self._home[name].name!r} and in {file.name!r}; remove the file that is wrong"
            )
        self._home.update(dict.fromkeys(file.tensors, file))


def _choose_files(directory: ModelDirectory) -> list[str]:
    """The whole ``model.safetensors``, as in transformers; else the files of the index; else all shards.

    An index none of whose files is there is left over from other files: then the shards that are there count.
    """
    if directory.has(SINGLE_FILE):
        return [SINGLE_FILE]
    weight_map = _weight_map(directory)
    shards = [name for name in directory.names(".safetensors") if not name.startswith(_OTHER_WEIGHTS)]
    if weight_map is None:
        return _complete(directory, shards)
    listed = sorted(set(weight_map.values()))
    if shards and not any(directory.has(name) for name in listed):
        return _complete(directory, shards)
    if not shards:
        raise _no_weights(directory, f", though {INDEX_FILE} names {len(listed)} file(s), e.g. {listed[0][:120]!r}")
    return listed


def _weight_map(directory: ModelDirectory) -> dict[str, str] | None:
    """Return tensor name to file name, from the index; None without one."""
    if not directory.has(INDEX_FILE):
        return None
    weight_map: Any = directory.read_json(INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map of tensor names to file names; the file is damaged")
    for file in set(weight_map.values()) if all(isinstance(file, str) for file in weight_map.values()) else (None,):
        if file is None or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_FILE} names the file {str(file)[:120]!r}, not a *.safetensors; it is damaged"
            )
    return weight_map


def _complete(directory: ModelDirectory, names: list[str]) -> list[str]:
    """``names``, of which no shard may be missing."""
    if not names:
        raise _no_weights(directory)
    for name in names:
        if shard := _SHARD.fullmatch(name):
            _check_series(names, shard)
    return names


def _no_weights(directory: ModelDirectory, detail: str = "") -> CheckpointError:
    found = describe_directory(directory.listing())
    return CheckpointError(
        f"model directory {str(directory.path)!r} holds no *.safetensors{detail}{'; ' + found if found else ''}"
    )


def _check_series(names: list[str], shard: re.Match[str]) -> None:
    count = shard["count"]
    expected = {f"{shard['stem']}{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)}
    if missing := expected.difference(names):
        raise CheckpointError(
            f"{len(missing)} of {int(count)} shards are missing: {list_names(missing)}; copy them too"
        )
