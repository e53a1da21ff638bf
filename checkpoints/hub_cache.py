# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face cache: a model's name to the directory of its newest download, without any network access.

Layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): ``models--ORG--NAME/{refs,snapshots,blobs}``;
``snapshots/REVISION`` holds links into ``blobs``, and ``refs/main`` the revision that was downloaded last.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from phalanx.parallel.errors import CheckpointError

__all__ = ["cache_root", "find_model", "is_blob", "is_model_name", "snapshot_of"]

_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def cache_root() -> Path:
    """Where the Hugging Face libraries keep downloads, by their environment variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return Path(value).expanduser()
    if value := os.environ.get("HF_HOME"):
        return Path(value).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def find_model(name: str) -> Path | None:
    """Directory of the downloaded model ``ORG/NAME``; None if ``name`` is no such name or not in the cache.

    Raises:
        CheckpointError: several revisions are there and none is marked as the newest.
    """
    if _NAME.fullmatch(name) is None:
        return None
    return snapshot_of(cache_root() / f"models--{name.replace('/', '--')}")


def is_model_name(name: str) -> bool:
    """Whether ``name`` has the form ``ORG/NAME``, or ``NAME`` for the oldest models."""
    return _NAME.fullmatch(name) is not None


def snapshot_of(path: Path) -> Path | None:
    """Newest snapshot where ``path`` is a model's directory in the cache; None where it is not.

    Raises:
        CheckpointError: several revisions are there and none is marked as the newest.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return None
    revisions = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    newest = _revision(path / "refs" / "main")
    if newest in revisions:
        return snapshots / newest
    if len(revisions) == 1:
        return snapshots / revisions[0]
    if not revisions:
        raise CheckpointError(f"{str(snapshots)!r} of the Hugging Face cache is empty; download the model again")
    raise CheckpointError(
        f"{str(path)!r} holds {len(revisions)} revisions of a model; give one, e.g. {str(snapshots / revisions[0])!r}"
    )


def is_blob(path: str) -> bool:
    """Whether ``path`` (without symbolic links) is a file among the blobs of a model in such a cache."""
    blobs = Path(path).parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--")


def _revision(file: Path) -> str:
    try:
        return file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
