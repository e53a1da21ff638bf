"""Formats of weights and caches that a TensorRT lacks are refused by name before weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.formats import DENSE, FormattedWeight, format_weights
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout
from phalanx.runtime.executors.tensorrt.engine_directory import EngineDirectory, EngineIdentity
from phalanx.runtime.executors.tensorrt.formats import (
    check_cache,
    check_formats,
    check_stripped,
    notes,
    quantised_formats,
)
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.models import find_model

from ..quantization import writers
from ..quantization.test_checkpoints import ALL, CASE
from ..support.checkpoints import write_checkpoint

LIBRARY = TensorRT(ModuleType("tensorrt"), "tensorrt", "11.4.0.106")
OLDEST = TensorRT8(ModuleType("tensorrt"), "tensorrt", "8.6.0")
CONFIG = find_model(CASE.config).read_config(CASE.config)


@pytest.fixture
def declared(tmp_path: Path) -> SimpleNamespace:
    """What the checkpoint of a name declares."""
    write_checkpoint(CASE, tmp_path / "dense")

    def weights(name: str) -> list[FormattedWeight]:
        module, section = ALL[name]
        if not (tmp_path / name).exists():
            writers.write(tmp_path / "dense", tmp_path / name, tmp_path / f"{name}-twin", module, section)
        with open_checkpoint(tmp_path / name) as checkpoint:
            return format_weights(find_model(CASE.config).weights(CONFIG), checkpoint.formats)

    return SimpleNamespace(of=weights)


@pytest.mark.parametrize("name", ["ct-fp8-channel", "ct-fp8-static", "ct-fp8-weight-only", "hf-fp8-blocks"])
def test_fp8_is_refused_for_gpus_without_it(declared: SimpleNamespace, name: str) -> None:
    weights = declared.of(name)
    check_formats(LIBRARY, CONFIG, weights, ("8.9", "9.0"))
    message = r"layers\.0\.qkv is fp8 .*, which tensorrt 11\.4\.0\.106 cannot build for compute capability 8\.0, 8\.9 .*use an int8 or 4-bit"
    with pytest.raises(ConfigError, match=message):
        check_formats(LIBRARY, CONFIG, weights, ("8.0", "8.9"))


@pytest.mark.parametrize("name", ["ct-int8", "ct-w4-g64", "awq", "gptq-4-order", "modelopt-smoothquant"])
def test_integers_are_taken_for_every_gpu(declared: SimpleNamespace, name: str) -> None:
    check_formats(LIBRARY, CONFIG, declared.of(name), ("8.0",))


@pytest.mark.parametrize("name", ALL)
def test_segments_take_plain_weights_only(declared: SimpleNamespace, name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.0\.qkv is .*but tensorrt 8\.6\.0 computes with plain .*--engine cuda"
    ):
        check_formats(OLDEST, CONFIG, declared.of(name), ("9.0",))


def test_engines_of_codes_are_not_stripped(declared: SimpleNamespace) -> None:
    with pytest.raises(
        ConfigError, match=r"--stripped leaves out plain weights only, but layers\.0\.qkv is int8 rows x"
    ):
        check_stripped(declared.of("ct-int8"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_fp8_cache_is_refused_where_the_cache_is_a_layer(dtype: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"the cache layer of tensorrt 11\.4.* takes 16- and 32-bit types only; use --kv-cache-dtype {dtype}, or --engine cuda",
    ):
        check_cache(LIBRARY, True, dtype)
    check_cache(LIBRARY, False, dtype)
    check_cache(OLDEST, True, dtype)


def test_another_scheme_of_the_same_tensors_makes_engines_stale(declared: SimpleNamespace, tmp_path: Path) -> None:
    shape = NetworkShape("float16", 2, 32, 16)

    def identity(name: str) -> EngineIdentity:
        formats = quantised_formats(declared.of(name))
        return EngineIdentity(CONFIG, shape, Layout(), "0" * 32, LIBRARY.name, ("8.9",), formats=formats)

    directory = EngineDirectory(tmp_path / "engines", "model")
    directory.prepare(identity("ct-fp8-channel"))
    with pytest.raises(ConfigError, match=r"stale: the checkpoint's quantization_config, or --quantize, changed"):
        directory.check(identity("fbgemm"), 0, "8.9")


def test_the_scheme_of_engines_is_said(declared: SimpleNamespace, tmp_path: Path) -> None:
    weights = declared.of("gptq-4-order")
    with open_checkpoint(tmp_path / "gptq-4-order") as checkpoint:
        lines = notes(weights, checkpoint.formats, "float16")
    assert lines == ["weights: int4 in groups of 16 with activation order"]
    partly = [replace(one, format=DENSE) if one.spec.owner == "layers.0.down" else one for one in weights]
    (line,) = notes(partly, checkpoint.formats, "float16")
    assert line.endswith(f"order (all but 1 of {4 * CONFIG.num_layers} matrices of layers)")
