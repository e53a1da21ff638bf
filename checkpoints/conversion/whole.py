"""What every conversion gives, and the directory that it becomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.dtypes import FLOAT_DTYPES, PLAIN_DTYPES
from phalanx.checkpoints.safetensors_layout import plan_file
from phalanx.checkpoints.source import Array, TensorInfo
from phalanx.parallel.errors import CheckpointError

__all__ = ["WholeModel", "config_dtype", "write_directory"]

_NAMES = {FLOAT_DTYPES[name]: name for name in PLAIN_DTYPES}
_CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class WholeModel:
    """Tensors over all ranks by name, and the ``config.json``, of which values None are left out."""

    tensors: Mapping[str, Array]
    config: Mapping[str, Any]


def config_dtype(array: Array) -> str:
    """Return what ``config.json`` calls the type of ``array``."""
    return _CONFIG_NAMES[_stored_name(array)]


def write_directory(model: WholeModel, output: Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into a directory that gets its name at the end.

    Raises:
        CheckpointError: a tensor is of a type other than float32, float16 and bfloat16.
    """
    layout = [(name, TensorInfo(array.shape, _stored_name(array))) for name, array in sorted(model.tensors.items())]
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "model.safetensors", "wb") as file:
        file.write(plan_file(layout, {"format": "pt"}).header)
        for name, _ in layout:
            file.write(np.ascontiguousarray(model.tensors[name]).view(np.uint8).data)
    given = {key: value for key, value in model.config.items() if value is not None}
    (partial / "config.json").write_text(json.dumps(given, indent=2) + "\n")
    partial.rename(output)


def _stored_name(array: Array) -> str:
    if array.dtype not in _NAMES:
        raise CheckpointError(f"a tensor is of type {array.dtype}; float32, float16 and bfloat16 can be converted")
    return _NAMES[array.dtype]
