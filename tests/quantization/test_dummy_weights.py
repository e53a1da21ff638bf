"""Dummy weights of every stored format: a device makes what the host does, bit for bit, and a model of them runs on both engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.cuda.weights import CudaSink
from phalanx.runtime.executors.weights import load_stage
from phalanx.runtime.models import find_model
from tests.kernels.emulation import EmulatedLibrary
from tests.support.fake_cupy import install_fake_cupy, install_fake_device

from .test_block_products import BLOCKS, WIDE, generate
from .test_checkpoints import ALL, CASE


def load(path: Path, sink: NumpySink | CudaSink) -> dict[str, np.ndarray]:
    """The share of the second of two ranks."""
    with open_checkpoint(path, "dummy", seed=3) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        load_stage(checkpoint.source, model, config, checkpoint.formats, Topology(Layout(tp=2), 1), sink)
    return sink.weights


@pytest.mark.parametrize("name", ALL)
def test_a_device_makes_the_hosts_codes_and_scales(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = {**CASE.config, "num_hidden_layers": 1, "dtype": "bfloat16", "quantization_config": ALL[name][1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    install_fake_cupy(monkeypatch)
    library = EmulatedLibrary(request.config.cache.mkdir("emulated-kernels"))
    expected, found = (load(tmp_path, sink) for sink in (NumpySink(), CudaSink("float32", library)))
    assert found.keys() == expected.keys()
    for weight, values in expected.items():
        np.testing.assert_array_equal(np.asarray(found[weight]).view(values.dtype), values, err_msg=weight)


def test_models_of_dummy_blocks_follow_the_numpy_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Within what a last bit of an input can move: most codes are those of the other engine."""
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    (tmp_path / "config.json").write_text(json.dumps({**WIDE.config, "quantization_config": BLOCKS}))
    expected, output = (generate(tmp_path, 1, engine, load_format="dummy") for engine in ("numpy", "cuda"))
    np.testing.assert_allclose(output, expected, atol=0.02)
