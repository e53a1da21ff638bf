# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all. Needs no NumPy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["partial_name", "write_whole"]


def partial_name(path: Path) -> Path:
    """Return where this process writes what becomes ``path``: next to it, on the same disk."""
    return path.with_name(f"{path.name}.{os.getpid()}")


def write_whole(path: Path, data: bytes) -> os.stat_result:
    """Replace or make a file, or leave everything as it was; returns which file it is.

    Raises:
        OSError: it cannot be written.
    """
    partial = partial_name(path)
    try:
        partial.write_bytes(data)
        written = partial.stat()
        partial.replace(path)
        return written
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
