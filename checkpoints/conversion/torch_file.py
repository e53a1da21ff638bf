# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, read by PyTorch as weights and plain values: they are pickles, of which nothing is run."""

from __future__ import annotations

import argparse
import importlib
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["array_of", "flat", "read_torch_file"]


_PASSED_OVER = ("megatron.", "numpy.", "signal.Signals", "pathlib.", "_io.BytesIO", "torch._C.Generator")
"""Names of what Megatron saves next to weights begin with these: its arguments, random states, and Transformer Engine's scales.

Source: ``megatron/core/safe_globals.py`` of Megatron-LM.
"""
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
"""Those of an array, as a random state holds one, for files whose names PyTorch cannot list."""
_NOT_PLAIN = "a weight or an argument of the checkpoint is an array, a number or an object of another program; save it as a tensor or plainly"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_BLOCKED = re.compile(r"GLOBAL ([\w.]+)")


class _StandIn:
    """An object of the training program, of which nothing is used."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __bool__(self) -> bool:  # it says nothing of the value that it stands for
        raise CheckpointError(_NOT_PLAIN)


def read_torch_file(file: Path | IO[bytes], name: str) -> Any:
    """Read what ``file`` holds. Objects that do nothing take the place of those that Megatron saves next to weights.

    Raises:
        ConfigError: PyTorch is not installed.
        CheckpointError: it holds anything else than weights and plain values, or is damaged; ``name`` is for the message.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ConfigError("phalanx convert needs PyTorch to read pickles; install it (pip install torch)") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # saved before PyTorch 1.6, or damaged
        names = _ARRAYS
    if not isinstance(file, Path):
        file.seek(0)
    stand_ins = [(type("StandIn", (_StandIn,), {}), each) for each in names if each.startswith(_PASSED_OVER)]
    with torch.serialization.safe_globals([argparse.Namespace, types.SimpleNamespace, *stand_ins]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip, torch
            raise CheckpointError(
                f"{name} cannot be read as weights and plain values: {_reason(_COLOUR.sub('', str(error)))}"
            ) from None


def _reason(message: str) -> str:
    """Why PyTorch refuses a file, and the way out; PyTorch's own would be to run what the file says."""
    if blocked := _BLOCKED.search(message):
        return (
            f"it holds {blocked[1]}, which is not run; save the weights without it in the program that wrote them "
            "(Megatron-LM: --no-save-optim --no-save-rng)"
        )
    _, _, inner = message.partition("WeightsUnpickler error: ")
    first, *_ = (inner or message).splitlines() or ["it is damaged"]
    return f"{first}; copy it again"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the values of nested mappings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def array_of(tensor: Any) -> Array:
    """Return the memory of a tensor as a NumPy array, which may be one already; bfloat16 is a type of ml_dtypes there.

    Raises:
        CheckpointError: it is no tensor.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if not hasattr(tensor, "detach"):
        raise CheckpointError(_NOT_PLAIN)
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    bits = tensor.view(importlib.import_module("torch").int16).numpy()
    return np.asarray(bits.view(ml_dtypes.bfloat16))
