# SPDX-License-Identifier: Apache-2.0
"""Where the server is, told once it answers: a line for people, a file for clients on other machines."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.whole_file import partial_name, write_whole

__all__ = ["Announcement"]

_LOG = logging.getLogger("phalanx.serve")
_ALL_ADDRESSES = ("0.0.0.0", "::")
_LONGEST = 1024
"""Bytes: more than the file will have."""


class Announcement:
    """What is told.

    Args:
        model: the name that requests use.
        file: JSON ``{"host", "port", "url", "model"}`` is written here when the server is ready and removed when it ends,
            for clients that cannot know on which machine a scheduler put it; None = no file.

    Raises:
        ConfigError: the file could not be written later.
    """

    def __init__(self, model: str, file: Path | None = None) -> None:
        self.model, self._file = model, file
        self._written: tuple[str, os.stat_result] | None = None
        if file is None:
            return
        try:
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _try_to_write(file)
        except OSError as error:
            raise ConfigError(
                f"--endpoint-file {file} cannot be written: {error.strerror}; name a file in a directory that may be written to"
            ) from None

    def publish(self, url: str) -> None:
        """The server at ``url`` answers. The file appears whole or not at all; without it the server serves all the same."""
        if self._file is not None:
            text = json.dumps(self._endpoint(url)) + "\n"
            try:
                self._written = text, write_whole(self._file, text.encode())
            except OSError as error:
                _LOG.warning(
                    "--endpoint-file %s cannot be written: %s; tell clients otherwise", self._file, error.strerror
                )
        sys.stderr.write(f"READY {url}\n")
        sys.stderr.flush()

    def withdraw(self) -> str:
        """The server ends; why its file stays, if it does. That of another server stays as well, even if it says the same: a supervisor's
        next one, say.
        """
        if self._file is None or self._written is None:
            return ""
        text, written = self._written
        try:
            if os.path.samestat(self._file.stat(), written) and self._file.read_text("utf-8") == text:
                self._file.unlink()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            return f"--endpoint-file {self._file} cannot be removed: {error}"
        return ""

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


def _try_to_write(path: Path) -> None:
    """Find out whether bytes can be written next to ``path``: a full disk takes names, but no bytes.

    Raises:
        OSError: they cannot.
    """
    partial = partial_name(path)
    try:
        partial.write_bytes(bytes(_LONGEST))
    finally:
        partial.unlink(missing_ok=True)
