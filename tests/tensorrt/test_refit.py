"""Stripped engines: which weights the network leaves out, and how they are filled in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.builder import load_shard
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.loading import refit
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.network import NetworkShape, write_network
from phalanx.runtime.executors.tensorrt.session import LoadedEngine

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .networks import open_request

SHAPE = NetworkShape("float16", 2, 32, 16)


@pytest.mark.parametrize(
    "case", ["llama-biases-llama3-rope", "llama-one-kv-head-tied", "gpt2-plain", "gemma-one-kv-head"]
)
def test_every_weight_is_marked_refittable_and_nothing_else(case: str, tmp_path: Path) -> None:
    library, request, source = open_request(write_checkpoint(CASES_BY_NAME[case], tmp_path / case), SHAPE)
    topology = Topology(Layout(tp=2), 1) if case != "llama-one-kv-head-tied" else Topology(Layout())
    weights = load_shard(request, source, topology)
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    network = library.create_network(builder)
    write_network(Graph(library, network, True), request.model, request.config, weights, topology, SHAPE)
    arrays = weights.arrays()
    names = {name for name in arrays if network.are_weights_marked_refittable(name)}
    distinct = {array.ctypes.data: name for name, array in reversed(arrays.items())}
    assert names == set(distinct.values())
    constants = sum(network.get_layer(index).type.name == "CONSTANT" for index in range(network.num_layers))
    assert constants > len(names)


class _Refitter:
    """Wants the weights that ``engine`` lists; refuses a size that it does not expect."""

    def __init__(self, engine: Any, logger: Any) -> None:
        self.wanted = dict(engine)
        self.given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.wanted)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.given[name] = weights
        return bool(weights.count == self.wanted[name])

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.wanted if name not in self.given]

    def refit_cuda_engine_async(self, stream: int) -> bool:
        return stream == 5


def _loaded(wanted: dict[str, int]) -> LoadedEngine:
    def weights(dtype: Any, address: int, count: int) -> Any:
        return SimpleNamespace(dtype=dtype, address=address, count=count)

    module = SimpleNamespace(Refitter=_Refitter, Weights=weights, DataType=SimpleNamespace(FLOAT="f32"))
    return LoadedEngine(TensorRT(module, "tensorrt", "11.4.0.106"), BuildLog(), None, None, wanted)  # type: ignore[arg-type]


def test_refit_gives_each_weight_that_the_engine_wants() -> None:
    weights = {"a.weight": np.zeros((2, 3), np.float32), "tied": np.zeros(4, np.float32)}
    refit(_loaded({"a.weight": 6}), weights, 5)
    with pytest.raises(ExecutorError, match=r"needs weight 'b', which is missing from the checkpoint"):
        refit(_loaded({"b": 6}), weights, 5)
    with pytest.raises(ExecutorError, match=r"rejects weight 'a.weight' \(2, 3\)"):
        refit(_loaded({"a.weight": 7}), weights, 5)
    with pytest.raises(ExecutorError, match="could not be refitted, 0 weight"):
        refit(_loaded({"a.weight": 6}), weights, 6)
