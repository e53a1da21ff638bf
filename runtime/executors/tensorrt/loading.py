# SPDX-License-Identifier: Apache-2.0
"""From an operator's choice to an engine on this rank's GPU: found, checked, or built on first use."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.kernels.compiler import cache_directory
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.parallel.nccl_comm import open_device_group
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import EngineConfig, ModelConfig
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.tensorrt.builder import BuildRequest, build_engine, load_shard, network_shape
from phalanx.runtime.executors.tensorrt.device import compute_capability
from phalanx.runtime.executors.tensorrt.engine_directory import EngineDirectory, EngineIdentity, weights_checksum
from phalanx.runtime.executors.tensorrt.formats import network_weights, notes, quantised_formats
from phalanx.runtime.executors.tensorrt.graph import Array
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.session import DeviceSession, LoadedEngine, SessionGroups

__all__ = ["check_sizes", "find_engine", "open_device", "open_session", "refit"]

_LOG = logging.getLogger("phalanx.tensorrt")


def open_session(spec: RankSpec, library: TensorRT) -> tuple[DeviceSession, NetworkShape]:
    """This rank's engine, ready to run, and the sizes that it was built for. *Collective over the replica.*

    Raises:
        ConfigError: no GPU that ``library`` supports, or engines that do not fit what is asked for.
        CheckpointError: the checkpoint does not fit the model.
        ExecutorError: the engine cannot be loaded.
    """
    device, stream, capability = open_device(library)
    path, request = find_engine(library, spec, capability)
    loaded = _deserialize(library, path)
    with device, stream:
        if request.stripped:
            refit(loaded, load_shard(request, spec.checkpoint.source, spec.topology).arrays(), stream.ptr)
            stream.synchronize()
        topology = spec.topology
        tensor, pipeline = (open_device_group(spec.comm, members) for members in (topology.tp_group, topology.pp_group))
        groups = SessionGroups(tensor, pipeline)
        session = DeviceSession(loaded, spec.model, spec.config, topology, request.shape, groups, device, stream)
    return session, request.shape


def open_device(library: TensorRT) -> tuple[Any, Any, str]:
    """This rank's GPU, made current; a stream on it; its compute capability.

    Raises:
        ConfigError: there is none, or ``library`` does not support it.
    """
    if compute_capability() is None:
        raise ConfigError(
            "--engine tensorrt found no GPU here; engines can be built here (phalanx build) and run on a machine "
            "that has one, or use --engine numpy"
        )
    from phalanx.runtime.executors.cuda.build import select_device

    device, stream = select_device()
    capability = compute_capability(device.id) or ""
    library.check_target(capability)
    return device, stream, capability


def find_engine(library: TensorRT, spec: RankSpec, capability: str) -> tuple[Path, BuildRequest]:
    """This rank's plan and what it was built from; without ``engine_dir``, built if need be. *Collective.*

    Raises:
        ConfigError: engines in ``engine_dir`` are missing, stale, for another machine or too small.
    """
    config, options, topology = spec.config, spec.options, spec.topology
    checksum = "" if library.computes_segments else _shared_checksum(spec.checkpoint, spec.comm)
    if options.engine_dir is not None:
        return _given_engine(library, spec, options.engine_dir, capability, checksum)
    shape = network_shape(
        config, options.dtype, options.max_num_seqs, options.max_model_len, options.max_num_batched_tokens,
        library.computes_segments,
    )  # fmt: skip
    formats, quantize = spec.checkpoint.formats, options.quantize
    request = BuildRequest(spec.model, config, shape, (capability,), formats=formats, quantize=quantize)
    identity = _identity(spec, library, shape, checksum, capability)
    directory = EngineDirectory.of(cache_directory() / "engines" / identity.key, spec.checkpoint.path)
    rank = topology.replica_rank
    engine = directory.engine(identity, rank)
    if spec.comm.rank == 0:
        directory.prepare(identity)
    spec.comm.barrier()
    if not engine.exists():
        if spec.comm.rank == 0:
            _LOG.info("building TensorRT engines in %s; later starts will find them there", directory.path)
            for note in notes(network_weights(spec.model, config, formats, quantize), formats, shape.dtype):
                _LOG.info(note)
        place = Topology(topology.layout, rank)
        build_engine(library, request, spec.checkpoint.source, place, engine, directory.timing_cache)
    return engine, request


def _given_engine(
    library: TensorRT, spec: RankSpec, engine_dir: Path, capability: str, checksum: str
) -> tuple[Path, BuildRequest]:
    config = spec.config
    directory = EngineDirectory.existing(engine_dir)
    found = directory.read_config()
    shape = directory.read_shape()
    stripped = not found.get("weights_checksum")
    identity = _identity(spec, library, shape, "" if stripped else checksum, capability)
    path = directory.check(identity, spec.topology.replica_rank, capability)
    check_sizes(spec.options, config, shape)
    if library.computes_segments and spec.options.max_num_batched_tokens > shape.max_prefill_tokens:
        raise _beyond("max_num_batched_tokens", spec.options.max_num_batched_tokens, shape.max_prefill_tokens)
    formats, quantize = spec.checkpoint.formats, spec.options.quantize
    return path, BuildRequest(spec.model, config, shape, (capability,), stripped, formats, quantize)


def _identity(
    spec: RankSpec, library: TensorRT, shape: NetworkShape, checksum: str, capability: str
) -> EngineIdentity:  # fmt: skip
    """What engines that serve ``spec`` are."""
    weights = network_weights(spec.model, spec.config, spec.checkpoint.formats, spec.options.quantize)
    return EngineIdentity(
        spec.config, shape, spec.topology.layout, checksum, library.name, (capability,), spec.model.code,
        quantised_formats(weights),
    )  # fmt: skip


def check_sizes(options: EngineConfig, config: ModelConfig, shape: NetworkShape) -> None:
    """Refuse options that go beyond what engines were built for.

    Raises:
        ConfigError: naming the option, the limit and the way out.
    """
    dtype = config.compute_dtype(options.dtype)
    if dtype != shape.dtype:
        raise ConfigError(
            f"the engines were built for dtype={shape.dtype}, but {dtype} was requested; use --dtype {shape.dtype}, or build "
            "them again with phalanx build"
        )
    for name, value in (("max_num_seqs", options.max_num_seqs), ("max_model_len", options.max_model_len or 1)):
        limit = getattr(shape, name)
        if value > limit:
            raise _beyond(name, value, limit)


def _beyond(name: str, value: int, limit: int) -> ConfigError:
    flag = "--" + name.replace("_", "-")
    return ConfigError(
        f"{flag}={value} exceeds the {limit} that the engines were built for; use {flag} {limit}, or build them "
        "again with phalanx build"
    )


def _shared_checksum(checkpoint: Checkpoint, comm: Communicator) -> str:
    """The checkpoint's checksum, computed by one rank. *Collective.*"""
    digest = np.zeros(16, np.uint8)
    if comm.rank == 0:
        checksum = weights_checksum(checkpoint, cache_directory() / "checksums")
        digest[:] = np.frombuffer(bytes.fromhex(checksum), np.uint8)
    return bytes(comm.broadcast(digest)).hex()


def _deserialize(library: TensorRT, path: Path) -> LoadedEngine:
    log = BuildLog()
    logger = library.logger(log)
    runtime = library.module.Runtime(logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExecutorError(
            f"{library.name} cannot load {path}: {log.cause() or 'it gave no reason'}; build it again with phalanx build"
        )
    kernel_path = path.with_suffix(".kernels")
    kernels = kernel_path.read_bytes() if kernel_path.exists() else b""
    cache = library.create_kernel_cache(engine, kernels)
    return LoadedEngine(library, log, logger, runtime, engine, cache, kernel_path)


def refit(loaded: LoadedEngine, weights: Mapping[str, Array], stream: int) -> None:
    """Fill in the weights of a stripped engine; tied ones have one name there. Enqueues on ``stream``.

    Raises:
        ExecutorError: the engine wants other weights than the checkpoint has.
    """
    library = loaded.library
    refitter = library.module.Refitter(loaded.engine, loaded.logger)
    for name in refitter.get_all_weights():
        if name not in weights:
            raise ExecutorError(
                f"the engine needs weight {name!r}, which is missing from the checkpoint; build it again"
            )
        array = weights[name]
        if not refitter.set_named_weights(name, library.weights(array)):
            raise ExecutorError(f"the engine rejects weight {name!r} {array.shape}; build it again")
    if (left := refitter.get_missing_weights()) or not refitter.refit_cuda_engine_async(stream):
        raise ExecutorError(f"the engine could not be refitted, {len(left)} weight(s) are missing; build it again")
