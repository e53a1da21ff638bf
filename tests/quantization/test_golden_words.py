"""Tensors that each format's own packer wrote of one matrix ``[32, 32]``, read to the very values that its own reader gives.

``golden_words.json`` was recorded once with the packages that each entry names, so that tests need none of them: stored bytes as hexadecimal
little-endian words, and the SHA-256 of the values ``[out, in]`` as float32. Scales of 16 bits were widened to float32 before they were multiplied.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.dtypes import NUMPY_DTYPES
from phalanx.checkpoints.formats import FormattedWeight, format_weights, read_formats
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard
from tests.support.memory_source import MemorySource

Array = np.ndarray[Any, Any]
GOLDEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("golden_words.json").read_text())
MODULE = "model.layers.0.mlp.down_proj"


def stored(entry: dict[str, Any]) -> dict[str, Array]:
    return {
        f"{MODULE}.{suffix}": np.frombuffer(bytes.fromhex(tensor["bytes"]), NUMPY_DTYPES[tensor["dtype"]]).reshape(
            tensor["shape"]
        )
        for suffix, tensor in entry["tensors"].items()
    }


def declared(entry: dict[str, Any], names: list[str], columns: int) -> FormattedWeight:
    """The matrix as a down projection, of which ranks share the columns."""
    part = Part(f"{MODULE}.weight", (32, columns), Shard(1, unit=16, has_short_last=bool(columns % 16)))
    plan = read_formats({"quantization_config": entry["section"]}).for_stored(names)
    (weight,) = format_weights([WeightSpec("layers.0.down.weight", (part,))], plan)
    return weight


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", GOLDEN)
def test_what_a_formats_own_packer_wrote_is_read_to_its_own_values(name: str, tp: int) -> None:
    entry = GOLDEN[name]
    tensors, columns = stored(entry), 29 if "by row" in name and "weight_packed" in entry["tensors"] else 32
    weight, shares = declared(entry, list(tensors), columns), []
    for rank in range(tp):
        sink = NumpySink()
        load_weights(MemorySource(tensors), weight.components, rank, tp, sink, (r".*\.(weight_shape|g_idx)",))
        components = {one.kind: sink.weights[one.name] for one in weight.components}
        shares.append(weight.format.dequantize(components))
    values = np.ascontiguousarray(np.concatenate(shares, axis=1), "<f4")
    assert values.shape == (32, columns)
    assert values[0, :4].tolist() == entry["first_values"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == entry["values_sha256"]


def test_the_matrix_has_values_of_many_sizes() -> None:
    """So that two nibbles, zero points or scales that are mixed up cannot give the same values."""
    words = {name: stored(GOLDEN[name]) for name in ("awq", "gptq 4 bits")}
    for tensors in words.values():
        for suffix in ("qweight", "qzeros", "scales"):
            array = tensors[f"{MODULE}.{suffix}"]
            assert len(np.unique(array)) > array.size / 2
