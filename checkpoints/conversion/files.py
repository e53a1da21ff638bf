# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint by their names in it: those of a directory, or the members of an archive, read where they lie."""

from __future__ import annotations

import contextlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["Directory", "Files", "opened"]


class Files(Protocol):
    """The files of a checkpoint by their names in it."""

    def names(self) -> list[str]:
        """Return all names, with ``/`` between their parts."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open one of them, which can be read from any place on."""
        ...


class Directory:
    """The files below a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        return [file.relative_to(self._path).as_posix() for file in self._path.rglob("*") if file.is_file()]

    def open(self, name: str) -> IO[bytes]:
        return open(self._path / name, "rb")


class _Archive:
    """The members of a tar file. Raises CheckpointError for one that is a link, or whose name leads out of it."""

    def __init__(self, archive: tarfile.TarFile, path: Path) -> None:
        self._archive, self._members = archive, {}
        for member in archive:
            place = PurePosixPath(member.name)
            if place.is_absolute() or ".." in place.parts:
                raise CheckpointError(f"{path} holds {member.name!r}, which leads out of the archive; do not trust it")
            if member.isfile():
                self._members[place.as_posix()] = member
            elif not member.isdir():
                raise CheckpointError(
                    f"{path} holds {member.name!r}, which is no file but a link or device; do not trust it"
                )

    def names(self) -> list[str]:
        return list(self._members)

    def open(self, name: str) -> IO[bytes]:
        file = self._archive.extractfile(self._members[name])
        assert file is not None, name
        return file


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Files]:
    """The files of a directory, or of a tar archive, compressed or not.

    Raises:
        ConfigError: it is neither.
        CheckpointError: the archive is damaged, or holds a link or a name that leads out of it.
    """
    if path.is_dir():
        yield Directory(path)
        return
    try:
        archive = tarfile.open(path)  # noqa: SIM115  closed below
    except (OSError, tarfile.TarError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise ConfigError(
            f"--input {str(path)!r} is neither a .nemo archive nor a directory of one{reason}; name one"
        ) from None
    with archive:
        try:
            files = _Archive(archive, path)
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise CheckpointError(f"{path} is cut off or damaged: {error}; copy it again") from None
        yield files
