"""A Hugging Face directory as a tensor source: one file, or shards with or without an index."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import FORMAT
from phalanx.checkpoints.resolve import list_names
from phalanx.checkpoints.safetensors_file import SafetensorsFile
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo
from phalanx.parallel.errors import CheckpointError

__all__ = ["INDEX_FILE", "DirectorySource"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_SHARD = re.compile(r"(?P<stem>.+-)(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class DirectorySource:
    """Tensors of all files of a directory; every header is verified when it is made.

    Raises:
        CheckpointError: no files, a missing shard, a tensor in two files, an index that does not agree with its files.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        weight_map = _weight_map(directory)
        names = sorted(set(weight_map.values())) if weight_map is not None else _find_files(directory)
        self._files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            for name in names:
                self._add(SafetensorsFile(directory, name))
            if weight_map is not None:
                self._check_index(weight_map)
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
                "copied in part; run launch.split again"
            )
        if twice := file.tensors.keys() & self._home.keys():
            name = min(twice)
            raise CheckpointError(
                f"tensor {name[:120]!r} is in {self._home[name].name!r} and in {file.name!r}; remove the file that is wrong"
            )
        self._home.update(dict.fromkeys(file.tensors, file))

    def _check_index(self, weight_map: dict[str, str]) -> None:
        if unlisted := self._home.keys() - weight_map.keys():
            raise CheckpointError(f"{INDEX_FILE} does not list {list_names(unlisted)}; it belongs to other files")
        for name, file in weight_map.items():
            if name not in self._home or self._home[name].name != file:
                raise CheckpointError(
                    f"{INDEX_FILE} puts tensor {name[:120]!r} into {file!r}, which does not hold it; copy both again"
                )


def _weight_map(directory: ModelDirectory) -> dict[str, str] | None:
    """Tensor name to file name, from the index; None without one."""
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


def _find_files(directory: ModelDirectory) -> list[str]:
    """Without an index: ``model.safetensors``, else all shards, none of which may be missing."""
    if directory.has(SINGLE_FILE):
        return [SINGLE_FILE]
    names = directory.names(".safetensors")
    if not names:
        other = directory.names(".bin") + directory.names(".pt") + directory.names(".gguf")
        hint = f"; {other[0]!r} must be converted to safetensors first" if other else ""
        raise CheckpointError(f"model directory {str(directory.path)!r} holds no *.safetensors{hint}")
    for name in names:
        if shard := _SHARD.fullmatch(name):
            _check_series(names, shard)
    return names


def _check_series(names: list[str], shard: re.Match[str]) -> None:
    count = shard["count"]
    expected = {f"{shard['stem']}{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)}
    if missing := expected.difference(names):
        raise CheckpointError(
            f"{len(missing)} of {int(count)} shards are missing: {list_names(missing)}; copy them too"
        )
