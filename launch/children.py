# SPDX-License-Identifier: Apache-2.0
"""What processes that a command starts need to run this very code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["same_code"]


def same_code() -> dict[str, str]:
    """An environment in which ``launch`` is this one, whatever the working directory holds."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).resolve().parent.parent), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
