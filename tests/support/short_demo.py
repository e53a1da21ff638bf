"""The first layers of the demo checkpoint: trained weights, quick to run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"

Array = np.ndarray[Any, Any]


def write_short_demo(path: Path, num_layers: int, change: Callable[[dict[str, Array]], None] | None = None) -> Path:
    """Write ``num_layers`` layers and the tokenizer to ``path``, after ``change`` of the tensors."""
    path.mkdir(parents=True)
    tensors = {name: array for file in DEMO.glob("*.safetensors") for name, array in load_file(file).items()}
    kept = ("model.embed", "model.norm", *(f"model.layers.{layer}." for layer in range(num_layers)))
    tensors = {name: array for name, array in tensors.items() if name.startswith(kept)}
    if change is not None:
        change(tensors)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((DEMO / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    shutil.copy(DEMO / "tokenizer.json", path)
    return path
