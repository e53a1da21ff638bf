"""Weights that become another form while they are loaded into a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.held import ExpertCodes
from phalanx.checkpoints.quantization.numbers import dequantize, quantize_rows
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.kernels.packed import unpack_weight
from phalanx.runtime.executors.cuda import weights
from phalanx.runtime.executors.cuda.weights import ConvertingSink
from tests.kernels.emulation import EmulatedLibrary
from tests.support.fake_cupy import install_fake_cupy


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_stack_of_experts_is_quantised_some_rows_at_a_time(
    kind: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """So the codes of few rows are in memory next to the floats and the packed codes, whatever the stack's size."""
    cupy = install_fake_cupy(monkeypatch)
    library = EmulatedLibrary(request.config.cache.mkdir("emulated-kernels"))
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 7 * 80)
    values = np.random.default_rng(5).normal(size=(48, 80)).astype(np.float16)
    sink = ConvertingSink("float16", library, {"layers.0.mlp.gate_up": ExpertCodes(RowCodes(kind))}, {})
    sink.allocate(("layers.0.mlp.gate_up.weight",), values.shape)[...] = values
    taken: list[int | tuple[int, ...]] = []
    monkeypatch.setattr(cupy, "empty", lambda shape, dtype: taken.append(shape) or cupy.zeros(shape, dtype))
    sink.allocate(("layers.0.mlp.down.weight",), (1, 80))
    packed: Any = sink.weights["layers.0.mlp.gate_up.weight"]
    assert taken == [packed.codes.shape, 48, (7, 80)]
    monkeypatch.undo()
    held = np.zeros(values.shape, np.float32)
    unpack_weight(library, packed, held)
    np.testing.assert_array_equal(held, dequantize(quantize_rows(values.astype(np.float32), kind)))
