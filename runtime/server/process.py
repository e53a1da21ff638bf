# SPDX-License-Identifier: Apache-2.0
"""One of the HTTP processes: answers 503 until the engine is ready, and dies with its parent (rank 0, or the supervisor)."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.parallel.parent import signal_when_parent_dies
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link.messages import FrontendRefused, ModelInfo
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.api_keys import read_api_keys
from phalanx.runtime.server.web.listener import ACCEPTS_PER_TURN
from phalanx.runtime.server.web.log import hold_log, start_logging

__all__ = ["main"]

LAST_ANSWERS_SECONDS = 2
"""How long open requests have to be told that the engine is gone, before the kernel ends this process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """``NUMBER CHANNEL ENGINES LISTENER STARTING BOARD SETTINGS``: which process this is, inherited descriptors, `FrontendSettings` as JSON.

    The descriptors: an end of the socket pair, a Unix socket where engines connect (-1: the socket pair leads to the engine), a
    listening socket, a pipe that is closed once this process answers, and the memory in which the processes count.
    """
    _tie_to_parent()
    number, channel, engines, listener, starting, board, encoded = sys.argv[1:] if arguments is None else arguments
    settings = msgspec.json.decode(encoded, type=FrontendSettings)
    log = start_logging(sys.stderr, settings.log_level, settings.log_format)
    _raise_descriptor_limit()
    api_keys = read_api_keys(settings.api_key_file)
    admin_keys = read_api_keys(settings.admin_key_file, "--admin-key-file") or api_keys
    sockets = socket.socket(fileno=int(listener)), socket.socket(fileno=int(channel))
    engines_ = None if int(engines) < 0 else socket.socket(fileno=int(engines))
    try:
        board_ = Board(int(board), int(number))
        asyncio.run(
            _serve(
                settings, api_keys, admin_keys, *sockets, engines_, board_, int(number), lambda: os.close(int(starting))
            )
        )
    finally:
        log.stop()
    return 0


def _tie_to_parent() -> None:
    """Signals of the terminal and of the job are rank 0's to act on; this process leaves when rank 0 does.

    SIGCONT tells it so, because that reaches a stopped process, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    signal.signal(signal.SIGCONT, lambda *_: None if os.getppid() == parent else signal.alarm(LAST_ANSWERS_SECONDS))
    signal_when_parent_dies(signal.SIGCONT)


def _raise_descriptor_limit() -> None:
    """One descriptor per connection: use all that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    settings: FrontendSettings,
    api_keys: Sequence[bytes],
    admin_keys: Sequence[bytes],
    listener: socket.socket,
    channel: socket.socket,
    engines: socket.socket | None,
    board: Board,
    number: int,
    on_started: Callable[[], None],
) -> None:
    from phalanx.runtime.server.app import build_app
    from phalanx.runtime.server.kserve.inference import Inference
    from phalanx.runtime.server.link.engine_client import EngineClient
    from phalanx.runtime.server.link.pulse import PulseCheck
    from phalanx.runtime.server.link.supervisor_link import EngineDoor, SupervisorLink
    from phalanx.runtime.server.metrics import Metrics
    from phalanx.runtime.server.services import Services
    from phalanx.runtime.server.web.h11_protocol import QuietServer

    loop = asyncio.get_running_loop()
    room = Room(board)
    metrics = Metrics(board, room, settings.metrics_compatibility, settings.model_names[0])
    loading: set[asyncio.Task[None]] = set()
    client = EngineClient(
        load_model=lambda model: loading.add(loop.create_task(_load(services, model))),
        on_gone=lambda: _leave(server),
        on_stats=metrics.take,
        room=room,
        process=number,
        on_change=None if engines is None else lambda state: supervisor.tell(state),
        on_quiet=hold_log,
    )
    supervisor = SupervisorLink(client, on_gone=lambda: _leave(server))
    workers = ThreadPoolExecutor(4, thread_name_prefix="tokenizer")
    services = Services(client, settings, metrics, workers)
    inference = Inference(services, board)
    app = build_app(services, inference, api_keys, admin_keys)
    server = QuietServer(_http_config(app, settings, lambda: client.is_draining), on_started)
    if engines is None:
        await loop.connect_accepted_socket(lambda: client, channel)
    else:
        await loop.connect_accepted_socket(lambda: supervisor, channel)
        await loop.create_unix_server(lambda: EngineDoor(client), sock=engines)
    grpc_server = await _start_grpc(inference, api_keys, settings)
    pulse = loop.create_task(PulseCheck(client, settings.silence_seconds, settings.starting_silence_seconds).run())
    await server.serve(sockets=[listener])
    pulse.cancel()
    if grpc_server is not None:
        await grpc_server.stop(LAST_ANSWERS_SECONDS)
    workers.shutdown(wait=False, cancel_futures=True)


def _http_config(app: Any, settings: FrontendSettings, is_draining: Callable[[], bool]) -> Any:
    """uvicorn's configuration: HTTP/1.1 alone, every wait and size bounded, logs left to `start_logging`."""
    import uvicorn

    from phalanx.runtime.server.web.h11_protocol import BoundedH11Protocol, ConnectionLimits

    def unread_seconds() -> float:
        return settings.draining_unread_seconds if is_draining() else settings.unread_seconds

    return uvicorn.Config(
        app,
        http=BoundedH11Protocol.with_limits(ConnectionLimits(settings.header_timeout_seconds, unread_seconds)),
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        limit_concurrency=settings.max_connections,
        backlog=ACCEPTS_PER_TURN,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


async def _start_grpc(inference: Any, api_keys: Sequence[bytes], settings: FrontendSettings) -> Any:
    """The gRPC server, if there is to be one; rank 0 is told if its port was taken meanwhile."""
    if settings.grpc_port is None:
        return None
    from phalanx.runtime.server.kserve.grpc_door import start_grpc

    try:
        return await start_grpc(inference, api_keys, settings)
    except ConfigError as error:
        inference.services.client.send(FrontendRefused(str(error)))
        return None


async def _load(services: Any, model: ModelInfo) -> None:
    """Load the tokenizer outside the event loop, then open for requests unless the engine was lost meanwhile."""
    from phalanx.runtime.server.garbage import collect_seldom
    from phalanx.runtime.text import Tokenizer

    loop = asyncio.get_running_loop()
    try:
        services.tokenizer = await loop.run_in_executor(
            services.workers, Tokenizer.from_directory, Path(model.directory)
        )
    except CheckpointError as error:
        services.client.send(FrontendRefused(str(error)))
        return
    collect_seldom(loop)
    if services.client.still_has(model):
        services.client.serve()


def _leave(server: Any) -> None:
    """Finish what can be finished; the kernel ends us if that hangs."""
    signal.alarm(LAST_ANSWERS_SECONDS + 2)
    server.should_exit = True
