"""Networks of the small checkpoints, and sessions that interpret them in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.source import TensorSource
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.tensorrt.builder import BuildRequest, load_shard
from phalanx.runtime.executors.tensorrt.engine_session import PassOutput, Wanted
from phalanx.runtime.executors.tensorrt.executor import TrtExecutor
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.network import (
    NetworkShape,
    RankNetwork,
    cache_shapes,
    write_network,
)
from phalanx.runtime.executors.tensorrt.passes import EnginePass
from phalanx.runtime.models import find_model

from .interpreter import NetworkInterpreter

Array = np.ndarray[Any, Any]
Disturbance = Callable[[list[Any]], None]
"""Changes attributes of a written network's layers."""

_HIDDEN_TAG = 1


@dataclass(frozen=True, slots=True)
class WrittenNetwork:
    """A network together with what it refers to."""

    library: TensorRT
    builder: Any
    request: BuildRequest
    network: RankNetwork


def open_request(checkpoint: Path, shape: NetworkShape) -> tuple[TensorRT, BuildRequest, TensorSource]:
    """What a build takes, for compute capability 8.9."""
    opened = open_checkpoint(checkpoint)
    model = find_model(opened.config)
    request = BuildRequest(model, model.read_config(opened.config), shape, ("8.9",), formats=opened.formats)
    return load_tensorrt(), request, opened.source


def write_rank_network(checkpoint: Path, topology: Topology, shape: NetworkShape) -> WrittenNetwork:
    """The network of one rank of a checkpoint."""
    library, request, source = open_request(checkpoint, shape)
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    weights = load_shard(request, source, topology)
    graph = Graph(library, library.create_network(builder))
    network = write_network(graph, request.model, request.config, weights, topology, shape)
    return WrittenNetwork(library, builder, request, network)


class InterpretedSession:
    """`EngineSession` that interprets the network; caches, stages and collectives are as on a GPU.

    Attributes:
        logits: of every pass, in order.
        wanted: what was asked of every pass.
    """

    def __init__(
        self, written: WrittenNetwork, topology: Topology, tensor_group: Communicator, pipeline: Communicator
    ) -> None:
        config, shape = written.request.config, written.request.shape
        graph = written.network.graph
        self.interpreter = NetworkInterpreter(written.library.module, graph.network, tensor_group, written)
        self.logits: list[Array] = []
        self.wanted: list[Wanted] = []
        self._topology, self._pipeline, self._hidden_size = topology, pipeline, config.hidden_size
        slots = cache_shapes(written.request.model, config, topology, shape)
        self._caches = {name: np.zeros((shape.max_num_seqs, *extents), np.float32) for name, extents in slots.items()}

    device = "interpreter"

    def run(self, engine_pass: EnginePass, wanted: Wanted) -> PassOutput | None:
        """Interpret one pass."""
        num_seqs, num_tokens = engine_pass.token_ids.shape
        slots = slice(engine_pass.first_slot, engine_pass.first_slot + num_seqs)
        inputs = {"positions": engine_pass.positions, "write_indices": engine_pass.write_indices}
        inputs |= {name: cache[slots] for name, cache in self._caches.items()}
        if self._topology.is_first_stage:
            inputs["token_ids"] = engine_pass.token_ids
        else:
            hidden = np.empty((num_seqs, num_tokens, self._hidden_size), np.float32)
            inputs["hidden"] = self._pipeline.recv(hidden, self._pipeline.rank - 1, _HIDDEN_TAG)
        if self._topology.is_last_stage:
            inputs["logit_rows"] = engine_pass.logit_rows
        outputs = self.interpreter.run(inputs)
        for name, cache in self._caches.items():
            cache[slots] = outputs[f"{name}.updated"]
        if not self._topology.is_last_stage:
            hidden_out = outputs["hidden_out"].reshape(num_seqs, num_tokens, self._hidden_size)
            self._pipeline.send(hidden_out, self._pipeline.rank + 1, _HIDDEN_TAG)
            return None
        wanted_rows = slice(len(engine_pass.rows))
        self.logits.append(outputs["logits"][wanted_rows])
        token_ids = np.where(np.isfinite(outputs["logit_sum"]), outputs["token_out"], np.int32(-1))
        self.wanted.append(wanted)
        return PassOutput(token_ids[wanted_rows], self.logits[-1] if wanted == "logits" else None)

    def close(self) -> None:
        """Nothing to release."""


def interpreted_executor(
    checkpoint: Path, topology: Topology, shape: NetworkShape, comm: Communicator, disturb: Disturbance | None = None
) -> tuple[TrtExecutor, InterpretedSession]:
    """The TensorRT executor of one rank over an interpreted network. *Collective over the replica.*"""
    tensor_group, pipeline = comm.split(topology.tp_group), comm.split(topology.pp_group)
    session = InterpretedSession(write_rank_network(checkpoint, topology, shape), topology, tensor_group, pipeline)
    if disturb is not None:
        disturb(session.interpreter.layers())
    return TrtExecutor(session, shape, topology, pipeline), session
