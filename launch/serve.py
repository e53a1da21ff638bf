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
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
    parser = CommandParser(prog="launch.serve", description="Answer requests (OpenAI and Triton protocols).")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: 127.0.0.1, this machine only)")  # fmt: skip
    server.add_argument(
        "--port", type=int, default=8000, metavar="PORT", help="TCP port; 0 = any free one, see the READY line"
    )
    server.add_argument("--grpc-port", type=int, metavar="PORT",
                        help="Triton's gRPC protocol (default: 8001; with --port 0, none); 0 = any free one")  # fmt: skip
    server.add_argument("--http-processes", type=int, metavar="N",
                        help="processes that share the port (default: one per four processors, at most eight)")  # fmt: skip
    server.add_argument("--served-model-name", nargs="+", metavar="NAME",
                        help="names that requests may use (default: the directory's name)")  # fmt: skip
    server.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs",
                        help="priority: requests with a lower priority field start first; fcfs (default) refuses the field")  # fmt: skip
    server.add_argument(
        "--request-timeout", type=float, metavar="SECONDS", help="maximum duration of a request (default: none)"
    )
    server.add_argument("--stall-timeout", type=float, default=300.0, metavar="SECONDS",
                        help="end the job when a step takes longer (default: 300); a silent rank ends it after at most 30")  # fmt: skip
    server.add_argument("--start-timeout", type=float, default=1800.0, metavar="SECONDS",
                        help="end the job when the ranks are not ready by then (default: 1800)")  # fmt: skip
    server.add_argument("--shutdown-timeout", type=float, default=25.0, metavar="SECONDS",
                        help="how long open requests may go on after a signal (default: 25, below Slurm's KillWait)")  # fmt: skip
    server.add_argument("--api-key-file", type=Path, metavar="FILE", help="accepted keys, one per line")
    server.add_argument("--ssl-certfile", type=Path, metavar="FILE",
                        help="serve HTTPS, and gRPC over TLS, with this certificate chain (PEM)")  # fmt: skip
    server.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key (PEM, no password)")
    server.add_argument("--admin-key-file", type=Path, metavar="FILE",
                        help="keys for POST /admin/drain (default: those of --api-key-file; without either it is refused)")  # fmt: skip
    server.add_argument("--supervise", action="store_true",
                        help="start the ranks, and restart them after a failure; clients stay connected")  # fmt: skip
    server.add_argument("-n", "--num-ranks", type=int, metavar="N",
                        help="ranks that --supervise starts (default: dp x pp x tp)")  # fmt: skip
    server.add_argument("--launcher", metavar="COMMAND",
                        help="how --supervise starts them (default: mpirun -n N; without ranks to start, none)")  # fmt: skip
    server.add_argument("--max-restarts", type=int, default=10, metavar="N",
                        help="give up after so many restarts in a row; ten minutes of service reset the count (default: 10)")  # fmt: skip
    parser.no_effect("without --supervise, which starts ranks; add that (mpirun -n starts them, too)", lambda args: not args.supervise,
                     "--num-ranks", "--launcher", "--max-restarts")  # fmt: skip
    server.add_argument("--endpoint-file", type=Path, metavar="FILE",
                        help="write host, port and model to this file when ready; removed at the end")  # fmt: skip
    server.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                        help="allow requests from web pages of this origin; * = any; repeatable")  # fmt: skip
    server.add_argument("--metrics-compatibility", nargs="+", default=[], metavar="SERVER",
                        help="also show metrics under the names of vllm or triton")  # fmt: skip
    server.add_argument("--tool-call-parser", default="auto", metavar="FORM",
                        help="how the model writes tool calls: hermes (Qwen too), llama3_json, mistral, pythonic, qwen3_coder, glm45, "
                        "deepseek_v3, none; auto (default) takes the form that the chat template teaches")  # fmt: skip
    server.add_argument("--no-generation-config", action="store_true",
                        help="ignore the sampling defaults of generation_config.json")  # fmt: skip
    server.add_argument("--insecure", action="store_true", help="accept other machines' requests without a key")
    add_model_arguments(parser)
    add_parallel_arguments(parser)
    parser.add_argument("--layout", choices=("auto",),
                        help="auto: choose dp, pp and tp for the highest throughput, as phalanx plan --optimise throughput")  # fmt: skip
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until drained; returns the exit status."""
    if launch_info().launcher is not None:
        _die_with_launcher()
    elif PLACE_VARIABLE not in os.environ:
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


def _die_with_launcher() -> None:
    """End this rank when its launcher dies. Open MPI's ranks would stay forever: idle ones do not notice."""
    from phalanx.runtime.server.web.parent import signal_when_parent_dies

    signal_when_parent_dies(signal.SIGKILL)


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
    from phalanx.runtime.server.link.bridge import EngineBridge
    from phalanx.runtime.server.link.leaders import router_over

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

    def on_ready() -> None:
        _LOG.info(start_block(about, frontend.url, announcement.model), extra=fields(**about))
        announcement.publish(frontend.url)

    bridge.run(model, on_ready)
    engine.release()


if __name__ == "__main__":
    run_command(main)
