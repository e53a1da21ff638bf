"""Weights that become another form while they are loaded into a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored
from phalanx.checkpoints.quantization.held import ExpertCodes, PackedCodes
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


def test_scales_of_one_matrix_at_a_time_are_held_both_ways(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In groups of 32 they are a quarter of 4-bit codes: as much again for the whole model would not fit where the model does."""
    install_fake_cupy(monkeypatch)
    library = EmulatedLibrary(request.config.cache.mkdir("emulated-kernels"))
    stored = PackedCodes(GroupCodes("int8", Stored("weight", "scale"), 32, 32))
    sink = ConvertingSink("float16", library, {}, {"layers.0.qkv": stored})
    sink.allocate(("layers.0.qkv.codes",), (48, 64), "I8")
    scale = sink.allocate(("layers.0.qkv.scale",), (48, 2), "F32")
    values = scale[...] = np.arange(96, dtype=np.float32).reshape(48, 2)
    loaded = weakref.ref(scale)
    del scale
    sink.allocate(("layers.0.output.codes",), (48, 48), "I8")
    assert loaded() is None
    np.testing.assert_array_equal(sink.weights["layers.0.qkv.scale"], values.T)
