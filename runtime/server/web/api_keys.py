# SPDX-License-Identifier: Apache-2.0
"""The file of accepted API keys."""

from __future__ import annotations

from pathlib import Path

from phalanx.parallel.errors import ConfigError

__all__ = ["read_api_keys"]


def read_api_keys(path: str | None) -> tuple[bytes, ...]:
    """One key per line; empty lines and ``#`` comments do not count.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in Path(path).read_bytes().splitlines()]
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}; check the path") from None
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one per line")
    return keys
