# SPDX-License-Identifier: Apache-2.0
"""Putting one rank together: checkpoint, model, executor, and on the leader the engine."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phalanx.checkpoints.checkpoint import Checkpoint, open_checkpoint
from phalanx.kernels.compiler import cache_directory
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.liveness.progress import RankProgress
from phalanx.parallel.liveness.watched_comm import WatchedCommunicator
from phalanx.parallel.topology import Topology
from phalanx.runtime.agreement import check_ranks_agree
from phalanx.runtime.answer import text_stream
from phalanx.runtime.config import EngineConfig, ModelConfig
from phalanx.runtime.control import ControlChannel
from phalanx.runtime.engine import Engine
from phalanx.runtime.executors.base import CacheSize, Executor
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.registry import create_executor
from phalanx.runtime.generation_config import GenerationConfig
from phalanx.runtime.guidance import GuideCompiler
from phalanx.runtime.kv_cache import BlockPlanner, CachePlanner, SlotPlanner
from phalanx.runtime.models import Model, find_model
from phalanx.runtime.models.expert_parallel import with_expert_parallel
from phalanx.runtime.models.tied import with_stored_head
from phalanx.runtime.models.user_file import shared_model
from phalanx.runtime.request import Request
from phalanx.runtime.scheduler import Scheduler, SchedulerConfig
from phalanx.runtime.step_records import StepRecord, record_path
from phalanx.runtime.text import TextStream, Tokenizer, tokenizer_end_token

__all__ = ["Replica", "build_replica"]

_LOG = logging.getLogger("phalanx.replica")


@dataclass(slots=True)
class Replica:
    """What one rank holds. ``engine`` is None on every rank but the leader; ``generation`` has the model's sampling defaults."""

    checkpoint: Checkpoint
    family: Model
    config: ModelConfig
    generation: GenerationConfig
    options: EngineConfig
    topology: Topology
    world: Communicator
    group: Communicator
    progress: RankProgress
    executor: Executor
    control: ControlChannel
    max_model_len: int
    engine: Engine | None

    @property
    def directory(self) -> Path:
        """Where the checkpoint and its tokenizer are."""
        return self.checkpoint.path


def build_replica(
    model: Path | None, options: EngineConfig, world: Communicator, progress: RankProgress | None = None, *,
    prepares_guides: bool = False,
) -> Replica:  # fmt: skip
    """Load this rank's shard and join its replica; ``progress`` shows how far it is. *Collective over all ranks.*

    With ``prepares_guides`` the leader gets ready for guided requests while it loads, so that the first one holds up no step.

    Raises:
        ConfigError: ranks differ in what must be the same; the layout, the engine or a size does not fit the model or this machine.
        CheckpointError: the checkpoint is missing or broken.
    """
    progress = progress or RankProgress()
    world = WatchedCommunicator(world, progress)
    topology = Topology(options.layout, world.rank)
    with ExitStack() as files:
        with progress.phase("opening the checkpoint"):
            checkpoint = files.enter_context(open_checkpoint(model, options.load_format, options.seed))
            family = _family(checkpoint, options, world)
            generation = GenerationConfig.read(checkpoint.generation_config)
            config = _config(family, checkpoint, generation, options)
        with progress.phase("comparing ranks"):
            check_ranks_agree(checkpoint, options, world, family, config)
        group = world.split(topology.replica_group)
        spec = RankSpec(family, config, checkpoint, options, topology, group, progress)
        guides = _guide_compiler(checkpoint.path, config)
        if prepares_guides and topology.is_leader:
            guides.prepare()
        with progress.phase("loading weights"):
            executor, own_max_model_len = create_executor(spec)
        # Replicas on unequal devices have unequal caches; a request may go to any of them.
        max_model_len = int(world.all_gather(np.array(own_max_model_len)).min())
    control = ControlChannel(group)
    engine = None
    if topology.is_leader:
        engine = Engine(_scheduler(spec, executor, max_model_len, guides), executor, control, progress)
        _record_step_times(spec, executor)
    progress.wait()
    return Replica(
        checkpoint, family, config, generation, options, topology, world, group, progress, executor, control, max_model_len,
        engine,
    )  # fmt: skip


def _family(checkpoint: Checkpoint, options: EngineConfig, world: Communicator) -> Model:
    """Find the family of a checkpoint; rank 0 logs one that is defined outside. *Collective.*"""
    family = find_model(checkpoint.config, shared_model(options.model_file, world))
    if family.code and world.rank == 0:
        _LOG.info("%s is defined by %s, sha256 %s", family.architecture, _origin(options), family.code)
    return family


def _config(family: Model, checkpoint: Checkpoint, generation: GenerationConfig, options: EngineConfig) -> ModelConfig:
    """Read the model's dimensions, with what other files of the checkpoint and the operator's options change in them."""
    end_token = tokenizer_end_token(checkpoint.path)
    config = _with_token_ids(family.read_config(checkpoint.config), generation, end_token)
    config = with_stored_head(family, config, checkpoint.source)
    return with_expert_parallel(family, config, options.expert_parallel)


def _guide_compiler(directory: Path, config: ModelConfig) -> GuideCompiler:
    return GuideCompiler(lambda: Tokenizer.from_directory(directory), config.vocab_size, config.eos_token_ids)


def _scheduler(spec: RankSpec, executor: Executor, max_model_len: int, guides: GuideCompiler) -> Scheduler:
    options, config = spec.options, spec.config
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_queued_requests=options.max_queued_requests,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            policy=options.scheduling_policy,
            prefix_end=spec.model.decode.attention(config, 0).prefix_end,
            num_microbatches=executor.num_microbatches,
            lookahead=executor.lookahead,
            seed=options.seed + spec.topology.replica,
            step_times=executor.step_times,
        ),
        _planner(executor.cache, options, max_model_len),
        guides,
        _texts(spec.checkpoint.path),
    )


def _texts(directory: Path) -> Callable[[Request], TextStream | None]:
    """Return what begins the text of an answer; the tokenizer is read for the first. None where there is none."""
    read = functools.cache(lambda: Tokenizer.from_directory(directory))

    def begin(request: Request) -> TextStream | None:
        tokenizer = read()
        return None if tokenizer is None else text_stream(tokenizer, request.prompt_token_ids, request.params)

    return begin


def _record_step_times(spec: RankSpec, executor: Executor) -> None:
    """Keep what the executor measured on this machine for `launch.plan`; nothing where it does not measure."""
    if executor.step_times is not None:
        record = StepRecord(executor.device, executor.step_times.rows, executor.step_times.stage_seconds)
        record.write(record_path(cache_directory(), spec.checkpoint.config, spec.dtype, spec.options))


def _origin(options: EngineConfig) -> str:
    return "an installed package" if options.model_file is None else f"--model-file {options.model_file}"


def _planner(cache: CacheSize, options: EngineConfig, max_model_len: int) -> CachePlanner:
    if cache.kind == "slots":
        return SlotPlanner(cache.num_blocks, max_model_len)
    return BlockPlanner(cache.num_blocks, cache.block_size, options.max_num_seqs, max_model_len, options.prefix_caching)


def _with_token_ids(config: ModelConfig, generation: GenerationConfig, end_token: int | None) -> ModelConfig:
    """The special tokens of ``generation_config.json`` replace those of ``config.json``; the tokenizer's end token counts, too."""
    end_tokens = generation.eos_token_ids or config.eos_token_ids
    if end_token is not None and end_token < config.vocab_size:
        end_tokens = tuple(dict.fromkeys((*end_tokens, end_token)))
    bos = config.bos_token_id if generation.bos_token_id is None else generation.bos_token_id
    return dataclasses.replace(config, bos_token_id=bos, eos_token_ids=end_tokens)
