# SPDX-License-Identifier: Apache-2.0
"""What every conversion gives, and the directory that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.dtypes import FLOAT_DTYPES, PLAIN_DTYPES
from phalanx.checkpoints.safetensors_layout import plan_file
from phalanx.checkpoints.source import Array, TensorInfo
from phalanx.parallel.errors import CheckpointError

__all__ = ["WRITTEN_FILES", "WholeModel", "config_dtype", "write_directory"]

WRITTEN_FILES = ("model.safetensors", "config.json")

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


def write_directory(model: WholeModel, directory: Path) -> None:
    """Write `WRITTEN_FILES`.

    Raises:
        CheckpointError: a tensor is of a type other than float32, float16 and bfloat16.
    """
    layout = [(name, TensorInfo(array.shape, _stored_name(array))) for name, array in sorted(model.tensors.items())]
    with open(directory / "model.safetensors", "wb") as file:
        file.write(plan_file(layout, {"format": "pt"}).header)
        for name, _ in layout:
            file.write(np.ascontiguousarray(model.tensors[name]).view(np.uint8).data)
    given = {key: value for key, value in model.config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(given, indent=2) + "\n")


def _stored_name(array: Array) -> str:
    if array.dtype not in _NAMES:
        raise CheckpointError(f"a tensor is of type {array.dtype}; float32, float16 and bfloat16 can be converted")
    return _NAMES[array.dtype]
