# SPDX-License-Identifier: Apache-2.0
"""What is installed here, as far as it decides what a command does."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import phalanx

__all__ = ["installed_versions", "version_text"]

_PACKAGES = (
    "numpy", "mpi4py", "mpich", "openmpi", "tokenizers", "cupy-cuda13x", "cupy-cuda12x", "nvmath-python",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12", "tensorrt", "tensorrt-bindings", "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Python, Phalanx, and the packages that change results or speed, as far as installed."""
    found = {"phalanx-llm": phalanx.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def version_text() -> str:
    """What ``--version`` prints: Phalanx in the first line, the rest below."""
    found = installed_versions()
    own = found.pop("phalanx-llm")
    lines = [f"phalanx {own}", f"  {'from':<14} {Path(__file__).resolve().parent.parent}"]
    lines += [f"  {name:<14} {number}" for name, number in found.items()]
    if "cupy-cuda13x" not in found and "cupy-cuda12x" not in found:
        lines.append("  no CuPy: the cuda engine needs the extra [cuda13] or [cuda12]")
    lines.append(f"  {'interpreter':<14} {sys.executable}")
    return "\n".join(lines)
