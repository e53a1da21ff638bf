# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.serve``: answer HTTP requests.

Rank 0 starts the HTTP processes before anything else, so that the port answers (503) while the ranks load.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    engine_config,
    job_arguments,
    own_arguments,
    run_command,
)
from phalanx.launch.auto_layout import set_layout
from phalanx.launch.drain import DrainSignals
from phalanx.launch.loading import start_progress
from phalanx.launch.serve_arguments import (
    add_address_arguments,
    add_lifetime_arguments,
    add_request_arguments,
    add_security_arguments,
)
from phalanx.launch.server_front import ServerFront
from phalanx.launch.start_block import describe, host_names, start_block
from phalanx.launch.supervise import PLACE_VARIABLE, supervise
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.logs import fields

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.parallel.liveness.progress import RankProgress
    from phalanx.parallel.liveness.watch import RankWatch
    from phalanx.runtime.replica import Replica
    from phalanx.runtime.server.link.leaders import Leader
    from phalanx.runtime.server.link.messages import ModelInfo

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.serve")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.serve", description="Answer requests over the protocols of OpenAI, Anthropic and Triton."
    )
    add_address_arguments(parser)
    add_request_arguments(parser)
    add_security_arguments(parser)
    add_lifetime_arguments(parser)
    add_model_arguments(parser)
    layout = add_parallel_arguments(parser)
    layout.add_argument("--layout", choices=("auto",),
                        help="auto: choose dp, pp and tp for the highest throughput, as phalanx plan --optimise throughput")  # fmt: skip
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until drained; returns the exit status."""
    if launch_info().launcher is None and PLACE_VARIABLE not in os.environ:
        args = own_arguments(build_parser(), argv)
        if args.supervise:
            return supervise(args, sys.argv[1:] if argv is None else argv)
    front = ServerFront()
    try:
        args, world = job_arguments(build_parser(), argv, front.open)
        # Not before: a signal that only some ranks act on while MPI starts would leave the others waiting there.
        if world.rank:
            DrainSignals.ignore()
        progress = _progress()
        with _watch(args, world, progress, front) as watch:
            signals = DrainSignals(watch, args.shutdown_timeout, is_supervised=PLACE_VARIABLE in os.environ)
            if world.rank == 0:
                signals.catch()
            _run_rank(args, world, progress, front, signals, watch)
    except BaseException as error:
        front.abandon(f"{type(error).__name__}: {error}")
        raise
    front.close()
    if world.rank == 0:
        _LOG.info("ended, every request was answered")
    return 0


def _run_rank(
    args: argparse.Namespace,
    world: Communicator,
    progress: RankProgress,
    front: ServerFront,
    signals: DrainSignals,
    watch: RankWatch,
) -> None:
    """Load this rank's share and work until the server is drained. *Collective over all ranks.*"""
    from phalanx.runtime.engine import follow
    from phalanx.runtime.replica import build_replica
    from phalanx.runtime.server.link.leaders import connect_leaders, serve_rank_0

    set_layout(args, world)
    config = engine_config(args, world.size)
    # The HTTP side admits as many requests as may run and wait; before the first step all of them wait, perhaps on one replica.
    queue = config.max_queued_requests + config.max_num_seqs * config.layout.dp
    hosts = host_names(world)
    with start_progress(world.rank == 0, front.tell_phase) as on_phase, progress.reporting(on_phase):
        replica = build_replica(
            args.model, dataclasses.replace(config, max_queued_requests=queue), world, progress, prepares_guides=True
        )
    leaders = connect_leaders(world, replica.topology)
    if replica.engine is None:
        with progress.phase("executing steps"), _in_service():
            follow(replica.control, replica.executor, progress)
    elif world.rank:
        with progress.phase("serving"), _in_service():
            serve_rank_0(leaders[0], replica.engine, _model_info(replica, queue, {}, {}))
    else:
        with progress.phase("serving"), _in_service():
            defaults = {} if args.no_generation_config else replica.generation.sampling_defaults()
            _lead(replica, leaders, watch, front, hosts, queue, signals, defaults)
    replica.executor.close()


@contextlib.contextmanager
def _in_service() -> Iterator[None]:
    """Too little memory is a mistake in flags while ranks load; later it is a failure, which another start may not meet.

    Raises:
        RuntimeError: in place of MemoryError, for which `run_command` has the status of a mistake.
    """
    try:
        yield
    except MemoryError as error:
        raise RuntimeError(f"not enough memory: {error}") from error


def _progress() -> RankProgress:
    from phalanx.parallel.liveness.progress import RankProgress

    return RankProgress()


def _watch(args: argparse.Namespace, world: Communicator, progress: RankProgress, front: ServerFront) -> RankWatch:
    """Notice a lost or stuck rank from here on; clients are told before the processes end. *Collective.*"""
    from phalanx.kernels.compiler import cache_directory
    from phalanx.parallel.liveness.judge import Limits
    from phalanx.parallel.liveness.watch import RankWatch

    limits = Limits(step=args.stall_timeout, start=args.start_timeout)
    reports = cache_directory() / "failures"
    return RankWatch(world, progress, limits, front.tell_failed, front.tell_trouble, reports, front.tell_pulse)


def _model_info(
    replica: Replica, max_open_requests: int, sampling_defaults: dict[str, float | int], about: dict[str, str]
) -> ModelInfo:
    from phalanx.runtime.server.link.messages import ModelInfo

    return ModelInfo(
        str(replica.directory),
        replica.config.vocab_size,
        replica.max_model_len,
        max_open_requests,
        sampling_defaults,
        about,
    )


def _lead(
    replica: Replica,
    leaders: Mapping[int, Leader],
    watch: RankWatch,
    front: ServerFront,
    hosts: str,
    max_open_requests: int,
    signals: DrainSignals,
    sampling_defaults: dict[str, float | int],
) -> None:
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.runtime.server.link.bridge import EngineBridge
    from phalanx.runtime.server.link.leaders import router_over
    from phalanx.runtime.text.backend import has_tokenizer

    frontend, announcement = front.frontend, front.announcement
    assert replica.engine is not None
    assert frontend is not None
    assert announcement is not None
    engine = router_over(replica.engine, leaders, replica.topology.layout, watch)
    bridge = EngineBridge(
        engine, frontend.channels, on_drain_request=signals.drain, num_saturated=lambda: watch.num_saturated
    )
    signals.on_drain(bridge.request_drain)
    about = describe(replica, announcement.model, hosts, frontend.grpc_in_words())
    model = _model_info(replica, max_open_requests, sampling_defaults, about)
    takes_texts = has_tokenizer(ModelDirectory.at(replica.directory))

    def on_ready() -> None:
        block = start_block(about, frontend.url, announcement.model, takes_texts, front.key_file)
        _LOG.info(block, extra=fields(**about))
        announcement.publish(frontend.url)

    bridge.run(model, on_ready)
    engine.release()


if __name__ == "__main__":
    run_command(main)
