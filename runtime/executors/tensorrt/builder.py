# SPDX-License-Identifier: Apache-2.0
"""Building one rank's engine: its shard is read once, and the plan goes to disk in pieces.

Peak host memory is the shard, the builder's own copy of it, and some hundred megabytes.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.checkpoints.formats import ALL_DENSE, FormatPlan
from phalanx.checkpoints.quantization.held import QuantizeName
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.source import TensorSource
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import DTypeName, ModelConfig
from phalanx.runtime.executors.quantised_loading import formats_while_loading, quantised
from phalanx.runtime.executors.sizes import longest_requested
from phalanx.runtime.executors.tensorrt.graph import Array, Graph
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.network import NetworkShape, RankNetwork, write_network
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES
from phalanx.runtime.executors.tensorrt.segments.plans import SegmentBuilder, digest, profile_sizes, write_plans
from phalanx.runtime.executors.tensorrt.segments.programs import check_segments, rank_programs
from phalanx.runtime.executors.weights import Weights, load_stage, stage_weights
from phalanx.runtime.models import Model

__all__ = [
    "BuildReport",
    "BuildRequest",
    "Progress",
    "build_engine",
    "check_model",
    "load_shard",
    "network_shape",
    "replace_file",
]

_DEFAULT_LONGEST = 4096
"""Tokens: a slot is allocated in full for every sequence, so a model's 131,072 positions are no default."""


Progress = Callable[[str, int, int], None]
"""Called with phase, step and number of steps (0 = not known), from the builder's threads."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build, for all ranks.

    Attributes:
        targets: compute capabilities.
        stripped: leave the weights out, to be filled in when the engine is loaded.
        formats: of the checkpoint's weights.
        quantize: into which codes float weights of layers are made while they are loaded.
    """

    model: Model
    config: ModelConfig
    shape: NetworkShape
    targets: tuple[str, ...]
    stripped: bool = False
    formats: FormatPlan = ALL_DENSE
    quantize: QuantizeName = "none"


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build took.

    Attributes:
        num_layers: of the network, as TensorRT counts; of all different segments.
        shard_bytes: this rank's weights in the compute type; 0 where the engine holds none.
        engine_bytes: the plan on disk.
        peak_bytes: most resident memory of the process so far.
        load_seconds, build_seconds: reading the shard; all of TensorRT's work, writing included.
        num_segments: how many engines the file holds.
    """

    num_layers: int
    shard_bytes: int
    engine_bytes: int
    peak_bytes: int
    load_seconds: float
    build_seconds: float
    num_segments: int = 1


def network_shape(
    config: ModelConfig, dtype: DTypeName, max_num_seqs: int, max_model_len: int | None, max_num_batched_tokens: int,
    is_segmented: bool = False,
) -> NetworkShape:  # fmt: skip
    """Sizes of engines from an operator's choices; segments hold no cache, so they fit sequences of any length.

    Raises:
        ConfigError: longer sequences than the model has positions for, or a size below 1.
    """
    length = longest_requested(config, max_model_len)
    if is_segmented:
        return NetworkShape(config.compute_dtype(dtype), max_num_seqs, config.max_positions, max_num_batched_tokens)
    if max_model_len is None:
        length = min(length, _DEFAULT_LONGEST)
    return NetworkShape(config.compute_dtype(dtype), max_num_seqs, length, min(max_num_batched_tokens, length))


def build_engine(
    library: TensorRT, request: BuildRequest, source: TensorSource, topology: Topology, path: Path,
    timing_cache: Path, progress: Progress | None = None,
) -> BuildReport:  # fmt: skip
    """Build the engine of ``topology``'s rank into ``path``, which appears whole or not at all.

    Args:
        timing_cache: kernel measurements, read if there and written back.

    Raises:
        ConfigError: the model cannot be expressed, or this library cannot build for the targets.
        CheckpointError: the checkpoint does not fit the model.
        ExecutorError: TensorRT failed; the message gives what it logged.
    """
    start = time.perf_counter()
    if isinstance(library, TensorRT8):
        return _build_segments(library, request, topology, path, timing_cache, progress)
    CAPABILITIES.check(request.model, request.config, request.shape.dtype)
    if progress is not None:
        progress("reading weights", 0, 0)
    weights = load_shard(request, source, topology)
    loaded = time.perf_counter()
    log = BuildLog()
    builder = _create_builder(library, log)
    network = _write_network(library, builder, request, weights, topology, log)
    config = _builder_config(library, builder, request, network)
    if progress is not None:
        monitor = library.progress_monitor(progress)
        log.keep_alive(monitor)
        config.progress_monitor = monitor
    library.set_timing_cache(config, timing_cache.read_bytes() if timing_cache.exists() else b"")
    engine_bytes = _write_plan(library, builder, network, config, path, log)
    replace_file(timing_cache, library.timing_cache(config))
    return BuildReport(
        num_layers=network.graph.network.num_layers,
        shard_bytes=_distinct_bytes(weights),
        engine_bytes=engine_bytes,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        load_seconds=loaded - start,
        build_seconds=time.perf_counter() - loaded,
    )


def check_model(library: TensorRT, model: Model, config: ModelConfig, dtype: str) -> None:
    """Refuse what engines of ``library`` cannot compute.

    Raises:
        ConfigError: with the first feature that is missing.
    """
    if library.computes_segments:
        check_segments(model, config, dtype)
    else:
        CAPABILITIES.check(model, config, dtype)


def _build_segments(
    library: TensorRT8, request: BuildRequest, topology: Topology, path: Path, timing_cache: Path, progress: Progress | None
) -> BuildReport:  # fmt: skip
    """As `build_engine`, with a plan for each different segment; no weights are read."""
    start, shape = time.perf_counter(), request.shape
    check_segments(request.model, request.config, shape.dtype)
    segments = rank_programs(request.model, request.config, request.formats, topology).segments
    sizes = profile_sizes(shape.max_num_seqs, shape.max_prefill_tokens)
    timings = timing_cache.read_bytes() if timing_cache.exists() else b""
    maker = SegmentBuilder(library, shape.numpy_dtype, sizes, timings)
    plans = {}
    for index, segment in enumerate(segments):
        if progress is not None:
            progress("building segments", index, len(segments))
        plans[digest(segment)] = maker.build(segment)
    engine_bytes = write_plans(path, plans, replace_file)
    replace_file(timing_cache, maker.timings)
    return BuildReport(
        maker.num_layers, 0, engine_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        load_seconds=0.0, build_seconds=time.perf_counter() - start, num_segments=len(plans),
    )  # fmt: skip


def load_shard(request: BuildRequest, source: TensorSource, topology: Topology) -> Weights[Array]:
    """One rank's weights in the compute type or as codes, read once, slice by slice.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    sink = NumpySink(dtype=request.shape.numpy_dtype, chunk_bytes=16 << 20)
    weights = load_stage(source, request.model, request.config, request.formats, topology, sink)
    declared = stage_weights(request.model, request.config, request.formats, topology)
    formats = formats_while_loading(declared, request.quantize)
    return weights.converted(lambda weight: quantised(weight, formats)) if formats else weights


def _create_builder(library: TensorRT, log: BuildLog) -> Any:
    logger = library.logger(log)
    try:
        builder = library.module.Builder(logger)
    except Exception as error:
        raise ConfigError(
            f"{library.name} cannot build engines on this machine: {log.cause() or error}; it needs a GPU and its driver, or "
            "install tensorrt-rtx, which builds without a GPU"
        ) from error
    log.keep_alive(logger)
    return builder


def _write_network(
    library: TensorRT, builder: Any, request: BuildRequest, weights: Weights[Array], topology: Topology, log: BuildLog
) -> RankNetwork:
    graph = Graph(library, library.create_network(builder), request.stripped)
    try:
        return write_network(graph, request.model, request.config, weights, topology, request.shape)
    except ExecutorError as error:
        raise ExecutorError(f"{error}: {log.cause() or 'it gave no reason'}") from error


def _builder_config(library: TensorRT, builder: Any, request: BuildRequest, network: RankNetwork) -> Any:
    config = builder.create_builder_config()
    library.set_targets(config, request.targets)
    library.enable_collectives(config)
    if request.shape.dtype == "float32":
        library.forbid_tf32(config)
    if request.stripped:
        library.set_refit(config)
    for shapes in network.profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, frequent, largest) in shapes.items():
            profile.set_shape(name, smallest, frequent, largest)
        config.add_optimization_profile(profile)
    return config


def _write_plan(
    library: TensorRT, builder: Any, network: RankNetwork, config: Any, path: Path, log: BuildLog
) -> int:  # fmt: skip
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            writer = library.stream_writer(file.write)
            if not builder.build_serialized_network_to_stream(network.graph.network, config, writer):
                raise ExecutorError(f"{library.name} could not build {path.name}: {log.cause() or 'it gave no reason'}")
            size = file.tell()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = _partial(path)
    partial.write_bytes(content)
    partial.replace(path)


def _partial(path: Path) -> Path:
    """Where this rank writes first: several may make the same file at once."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")


def _distinct_bytes(weights: Weights[Array]) -> int:
    return sum({array.ctypes.data: array.nbytes for array in weights.arrays().values()}.values())
