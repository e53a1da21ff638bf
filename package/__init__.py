# SPDX-License-Identifier: Apache-2.0
"""Phalanx: distributed LLM inference on MPI ranks.

``from phalanx import LLM, SamplingParams`` is the Python interface; ``python -m launch.<command>`` the command line.
Importing this package is cheap: nothing below touches MPI, a GPU or NumPy until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.runtime.llm import LLM
    from phalanx.runtime.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_EXPORTS = {"LLM": "phalanx.runtime.llm", "SamplingParams": "phalanx.runtime.request"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
