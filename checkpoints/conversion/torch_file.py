"""Files of ``torch.save``, read by PyTorch as weights and plain values: they are pickles, of which nothing is run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["array_of", "flat", "read_torch_file"]


_PASSED_OVER = ("megatron.", "signal.Signals", "pathlib.")
"""Classes whose objects are among Megatron's arguments and are not read: names begin with these."""


class _StandIn:
    """An object of a class of the training program, of which nothing is used."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass


def read_torch_file(file: Path | IO[bytes], name: str) -> Any:
    """Read what ``file`` holds. Objects that do nothing take the place of those of Megatron's classes.

    Raises:
        ConfigError: PyTorch is not installed.
        CheckpointError: it holds anything else than weights and plain values, or is damaged; ``name`` is for the message.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ConfigError("launch.convert needs PyTorch to read pickles; install it (pip install torch)") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # saved before PyTorch 1.6, or damaged
        names = []
    if not isinstance(file, Path):
        file.seek(0)
    stand_ins = [(type("StandIn", (_StandIn,), {}), each) for each in names if each.startswith(_PASSED_OVER)]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip, torch
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{name} cannot be read as weights and plain values: {first}") from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the values of nested mappings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def array_of(tensor: Any) -> Array:
    """Return the memory of a tensor as a NumPy array, which may be one already; bfloat16 is a type of ml_dtypes there."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    bits = tensor.view(importlib.import_module("torch").int16).numpy()
    return np.asarray(bits.view(ml_dtypes.bfloat16))
