# SPDX-License-Identifier: Apache-2.0
"""Opening files of a model directory, and nothing outside it.

File names come from untrusted data (an index, a manifest), so every file is opened through `ModelDirectory`: a plain name, a
regular file, and after symbolic links still inside the directory or among the blobs of a Hugging Face cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.checkpoints.file_kinds import HEAD_BYTES, describe_content, describe_directory
from phalanx.checkpoints.hub_cache import cache_root, find_model, is_blob, is_model_name, snapshot_of
from phalanx.parallel.errors import CheckpointError

__all__ = ["PARTIAL_SUFFIX", "ModelDirectory", "parse_json"]

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a directory that a split is being written into."""

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is read; the index of the largest public checkpoints is about half as long."""


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A directory whose files can be opened by plain name. ``path`` is as given, ``root`` without symbolic links."""

    path: Path
    root: Path

    @staticmethod
    def at(path: Path) -> ModelDirectory:
        """The directory at ``path``, or of the model of that name in the Hugging Face cache.

        The cache's own directory of a model (``models--ORG--NAME``) stands for its newest snapshot.

        Raises:
            CheckpointError: it is not there, not a directory, or one that an interrupted command left.
        """
        if not path.exists() and (cached := find_model(str(path))) is not None:
            path = cached
        elif path.is_dir() and not (path / "config.json").exists():
            path = snapshot_of(path) or path
        root = Path(os.path.realpath(path))
        if not root.is_dir():
            raise CheckpointError(_not_a_directory(path, root.exists()))
        if root.name.endswith(PARTIAL_SUFFIX):
            raise CheckpointError(
                f"{str(path)!r} was left by an interrupted command; remove it and run the command that writes it again"
            )
        return ModelDirectory(path, root)

    def subdirectory(self, name: str) -> ModelDirectory:
        """The directory ``name`` in this one, whose files must really be in it; it need not be there."""
        return ModelDirectory(self.path / name, self.root / name)

    def has(self, name: str) -> bool:
        """Whether something of that name is there."""
        return os.path.lexists(self.root / name)

    def names(self, suffix: str) -> list[str]:
        """Names that end in ``suffix``, sorted. Raises `CheckpointError` where the directory may not be listed."""
        try:
            return sorted(name for name in os.listdir(self.root) if name.endswith(suffix))
        except OSError as error:
            raise CheckpointError(f"cannot list model directory {str(self.path)!r}: {error.strerror}") from None

    def listing(self) -> list[str]:
        """Names of all files, those of direct subdirectories as ``sub/name``; for messages, so it never raises."""
        found: list[str] = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root):
                if entry.is_dir():
                    with contextlib.suppress(OSError):
                        found += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path)]
                else:
                    found.append(entry.name)
        return sorted(found)

    def check_size(self, name: str, num_bytes: int) -> None:
        """Raise `CheckpointError` unless the file ``name`` has exactly ``num_bytes``."""
        try:
            size = os.stat(self._real_path(name)).st_size
        except OSError:
            raise self._missing(name) from None
        if size != num_bytes:
            self.check_content(name)
            raise CheckpointError(f"{name!r} has {size} bytes instead of {num_bytes}; copy the file again")

    def open(self, name: str) -> int:
        """File descriptor of a regular file, for reading; the caller closes it.

        Raises:
            CheckpointError: it is missing, unreadable, not a regular file, or outside the directory.
        """
        real = self._real_path(name)
        try:
            # O_NONBLOCK: opening a pipe must not hang. O_NOFOLLOW: links were resolved, and checked, just before.
            descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise CheckpointError(f"cannot open {name!r} of {str(self.path)!r}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(
                f"{name!r} of {str(self.path)!r} is not a regular file; replace it by the file itself"
            )
        return descriptor

    def check_content(self, name: str) -> None:
        """Raise `CheckpointError` if the file ``name`` is recognisably something else: a pointer, a web page, an archive."""
        with open(self.open(name), "rb") as file:
            description = describe_content(file.read(HEAD_BYTES))
        if description is not None:
            raise CheckpointError(f"{name!r} of {str(self.path)!r} is {description}")

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """The whole of a small file.

        Raises:
            CheckpointError: as `open`, or it is longer than ``limit`` bytes.
        """
        with open(self.open(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{name!r} has {size} bytes, more than the {limit} that such a file may have")
            return file.read(limit)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file whose top level is an object.

        Raises:
            CheckpointError: as `read`, or it is not such JSON.
        """
        raw = self.read(name)
        if not raw.lstrip().startswith(b"{") and (description := describe_content(raw[:HEAD_BYTES])) is not None:
            raise CheckpointError(f"{name!r} of {str(self.path)!r} is {description}")
        value = parse_json(raw, name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{name!r} holds no JSON object at its top level; the file is damaged")
        return value

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(f"{name!r} is missing from model directory {str(self.path)!r}; copy it there")

    def _real_path(self, name: str) -> str:
        if not _is_plain(name):
            raise CheckpointError(f"file name {name[:120]!r} is not a plain name inside the model directory")
        real = os.path.realpath(self.root / name)
        if os.path.dirname(real) != str(self.root) and not is_blob(real):
            raise CheckpointError(
                f"{name!r} links to {real!r}, outside the model directory; a checkpoint from elsewhere could expose any file "
                "of this machine that way, so replace the link by the file, or give the directory that holds it"
            )
        return real


def _not_a_directory(path: Path, exists: bool) -> str:
    if exists:
        kind = describe_directory([path.name]) or ""
        return f"model directory {str(path)!r} is a file; give a directory with config.json and *.safetensors{kind and f' ({kind})'}"
    if path.is_symlink():
        return f"model directory {str(path)!r} is a link to {os.readlink(path)!r}, where there is no directory; correct the link"
    message = f"model directory {str(path)!r} does not exist; give a directory with config.json and *.safetensors"
    if is_model_name(str(path)):
        message += f". If it is the name of a model: it is not in the Hugging Face cache {str(cache_root())!r}; `hf download {path}` gets it"
    return message


def _is_plain(name: str) -> bool:
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        return False
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def parse_json(raw: bytes, what: str) -> Any:
    """Parse JSON, refusing keys that occur twice (parsers differ in which one counts).

    Raises:
        CheckpointError: it is not JSON, or a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = max(counts, key=counts.__getitem__)
            raise CheckpointError(f"{what!r} holds the key {twice[:120]!r} twice; the file is damaged")
        return result

    try:
        return json.loads(raw.decode(), object_pairs_hook=unique)
    except (CheckpointError, MemoryError):
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what!r} is not valid JSON ({str(error)[:120]}); the file is damaged") from None
