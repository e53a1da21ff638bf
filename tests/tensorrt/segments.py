"""Segments interpreted between the NumPy executor's own operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.numpy.ops import NumpyOps
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.segments.decode import Programs, segmented
from phalanx.runtime.executors.tensorrt.segments.lowering import input_name, output_name, write_segment
from phalanx.runtime.executors.tensorrt.segments.program import Segment, SegmentCall
from phalanx.runtime.executors.tensorrt.segments.programs import rank_programs
from phalanx.runtime.executors.weights import Weights, load_stage
from phalanx.runtime.models import find_model
from phalanx.runtime.models.base import Family
from phalanx.runtime.ops import ExpertsSpec
from phalanx.runtime.step import StepLimits

from .interpreter import NetworkInterpreter
from .steps import RecordingNumpyExecutor

Array = np.ndarray[Any, Any]


class ComposingTensorRT(TensorRT):
    """A library that is treated as TensorRT 8.6 in what it composes: GELU and LayerNorm from simpler layers."""

    @property
    def has_fused_layers(self) -> bool:
        return False


def composing_library() -> TensorRT:
    """The installed TensorRT for RTX."""
    found = load_tensorrt()
    return ComposingTensorRT(found.module, found.flavour, found.version)


class InterpretedSegments:
    """`SegmentRunner` that interprets each segment's network.

    Attributes:
        num_written: networks, one for each different segment.
    """

    def __init__(self, library: TensorRT) -> None:
        self._library, self._interpreters = library, {}  # type: ignore[var-annotated]
        self._builder = library.module.Builder(library.logger(lambda severity, message: None))

    @property
    def num_written(self) -> int:
        return len(self._interpreters)

    def run(
        self, call: SegmentCall, inputs: Sequence[Array], weights: Sequence[Array], outputs: Sequence[Array]
    ) -> None:
        segment = call.segment
        if segment not in self._interpreters:
            self._interpreters[segment] = self._write(segment)
        named = {input_name(index): np.asarray(array, np.float32) for index, array in enumerate(inputs)}
        named |= {
            name: np.atleast_2d(np.asarray(array, np.float32))
            for (name, _), array in zip(segment.weights, weights, strict=True)
        }
        found = self._interpreters[segment].run(named)
        for index, output in enumerate(outputs):
            output[...] = found[output_name(index)]

    def _write(self, segment: Segment) -> NetworkInterpreter:
        graph = Graph(self._library, self._library.create_network(self._builder))
        write_segment(graph, segment, np.dtype(np.float32))
        return NetworkInterpreter(self._library.module, graph.network, SelfCommunicator(), graph)


class SurroundingNumpyOps(NumpyOps):
    """The reference's operations, as what lies between segments needs them; those in segments must not be called."""

    weights: Weights[Array]

    @property
    def stops_before_logits(self) -> bool:
        return self.stop_before_logits

    def logit_rows(self, x: Array) -> Array:
        return x

    def rows_of(self, x: Array, other: Array) -> Array:
        return x

    def empty(self, like: Array, width: int) -> Array:
        return np.full((len(like), width), np.nan, np.float32)

    def experts(self, x: Array, name: str, spec: ExpertsSpec) -> Array:
        self.__class__ = NumpyOps  # type: ignore[assignment] # they multiply by their router
        try:
            return NumpyOps.experts(self, x, name, spec)
        finally:
            self.__class__ = SurroundingNumpyOps

    def column_linear(self, x: Array, name: str) -> Array:
        raise AssertionError("a product outside of segments")

    row_linear_partial = rms_norm = layer_norm = column_linear  # type: ignore[assignment]


def segmented_executor(
    checkpoint: Path, topology: Topology, shape: NetworkShape, comm: Communicator, library: TensorRT
) -> tuple[RecordingNumpyExecutor, Programs, InterpretedSegments]:
    """The NumPy executor of one rank, its model computed by interpreted segments. *Collective over the replica.*"""
    with open_checkpoint(checkpoint) as opened:
        model = find_model(opened.config)
        config = model.read_config(opened.config)
        weights = load_stage(opened.source, model, config, opened.formats, topology, NumpySink())
        programs = rank_programs(model, config, opened.formats, topology)
    runner = InterpretedSegments(library)
    lowered: Family[Any] = replace(model, passes={"decode": segmented(model.decode, programs, runner)})
    limits = StepLimits(shape.max_num_seqs, shape.max_prefill_tokens, shape.max_model_len, shape.max_model_len, 1)
    executor = RecordingNumpyExecutor(lowered, config, weights, topology, comm, limits, shape.max_num_seqs)
    executor._ops.__class__ = SurroundingNumpyOps
    executor._ops.weights = weights  # type: ignore[attr-defined]
    return executor, programs, runner


def operations(programs: Programs) -> list[str]:
    """Every operation of every segment of the blocks, in order."""
    segments = programs.blocks.segments
    return list(itertools.chain.from_iterable([call.operation for call in one.calls] for one in segments))
