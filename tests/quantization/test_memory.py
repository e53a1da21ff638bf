"""Loading packed weights holds what the engine keeps and a few chunks: words are unpacked piece by piece."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phalanx.checkpoints.formats import components_of, format_weights, read_formats
from phalanx.runtime.models import find_model

from . import test_checkpoints as checkpoints

CONFIG = {**checkpoints.CASE.config, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 32}
MATRIX = 1024 * 4096
"""Bytes of the largest matrix's codes, which are read as one chunk."""
SECTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False},
    "awq": checkpoints.ALL["awq-g64"][1],
    "compressed": checkpoints.ALL["ct-w4-g64-asymmetric"][1],
}


def random_checkpoint(path: Path, section: dict[str, Any]) -> Path:
    """Of any words: what they stand for does not matter here."""
    config, random = {**CONFIG, "quantization_config": section}, np.random.default_rng(0)
    model = find_model(config)
    tensors = {}
    for component in components_of(format_weights(model.weights(model.read_config(config)), read_formats(config))):
        for part in component.parts:
            is_packed = component.kind in ("codes", "zero")
            words = random.integers(-(2**31), 2**31 - 1, part.stored_shape, np.int64).astype(np.int32)
            tensors[part.source] = words if is_packed else np.zeros(part.stored_shape, np.float16)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_loading_holds_no_second_copy(tmp_path: Path, name: str, rank: int, size: int) -> None:
    path = random_checkpoint(tmp_path / "model", SECTIONS[name])
    tracemalloc.start()
    try:
        weights = checkpoints.load(path, size, rank)  # noqa: F841  (kept while memory is read)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held > 15e6
    assert peak - held < 3 * MATRIX, "words became wider values on the way"
