# SPDX-License-Identifier: Apache-2.0
"""Where the server is, told once it answers: a line for people, a file for clients on other machines."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from phalanx.parallel.errors import ConfigError

__all__ = ["Announcement"]

_ALL_ADDRESSES = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is told.

    Attributes:
        model: the name that requests use.
        file: JSON ``{"host", "port", "url", "model"}`` is written here when the server is ready and removed when it ends,
            for clients that cannot know on which machine a scheduler put it; None = no file.

    Raises:
        ConfigError: the file could not be written later.
    """

    model: str
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.file is None:
            return
        try:
            if self.file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._partial(self.file).touch()
            self._partial(self.file).unlink()
        except OSError as error:
            raise ConfigError(
                f"--endpoint-file {self.file} cannot be written: {error.strerror}; name a file in a directory that may be "
                "written to"
            ) from None

    def publish(self, url: str) -> None:
        """The server at ``url`` answers. The file appears whole or not at all."""
        if self.file is not None:
            partial = self._partial(self.file)
            partial.write_text(json.dumps(self._endpoint(url)) + "\n")
            partial.replace(self.file)
        sys.stderr.write(f"READY {url}\n")
        sys.stderr.flush()

    def withdraw(self) -> None:
        """The server ends."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    @staticmethod
    def _partial(file: Path) -> Path:
        return file.with_name(f"{file.name}.{os.getpid()}")

    def _endpoint(self, url: str) -> dict[str, str | int | None]:
        address = urlsplit(url)
        host = address.hostname
        if host in _ALL_ADDRESSES:
            host = socket.gethostname()
        return {
            "host": host,
            "port": address.port,
            "url": f"{address.scheme}://{_bracketed(host)}:{address.port}",
            "model": self.model,
        }


def _bracketed(host: str | None) -> str:
    return f"[{host}]" if host is not None and ":" in host else str(host)
