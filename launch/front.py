# SPDX-License-Identifier: Apache-2.0
"""The HTTP processes of ``launch.serve``: from flags to settings, and their start."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from phalanx.launch.children import same_code
from phalanx.launch.parser import log_format, log_level
from phalanx.parallel.errors import ConfigError, printable

if TYPE_CHECKING:
    from phalanx.runtime.server.link.frontend import Frontend
    from phalanx.runtime.server.settings import FrontendSettings

__all__ = ["frontend_settings", "model_names", "start_frontend"]

HTTP_PROCESS = (sys.executable, "-P", "-m", "launch.http_process")
MAX_DEFAULT_HTTP_PROCESSES = 8
GRPC_PORT = 8001
STALLED_HEALTH_SECONDS = 60.0
"""``/health`` fails after so long without a finished step, though the job may go on."""


def start_frontend(args: argparse.Namespace, *, outlives_engine: bool = False) -> Frontend:
    """Open the port and start the HTTP processes; ``outlives_engine``: under a supervisor.

    Raises:
        ConfigError: an address, a key file or a certificate cannot be used.
    """
    from phalanx.runtime.server.link.frontend import Frontend

    grpc_port, missing = _grpc_port(args)
    settings = frontend_settings(args, grpc_port)
    frontend = Frontend.start(HTTP_PROCESS, settings, same_code(), outlives_engine=outlives_engine)
    frontend.without_grpc = missing
    return frontend


def model_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Names under which requests may ask for the model; the first one is shown."""
    name = "phalanx-demo" if args.model is None else args.model.resolve().name
    return tuple(args.served_model_name or (name,))


def frontend_settings(args: argparse.Namespace, grpc_port: int | None) -> FrontendSettings:
    """What the HTTP side must know of the flags.

    Raises:
        ConfigError: a value is out of range, or not UTF-8.
    """
    from phalanx.parallel.liveness.judge import Limits
    from phalanx.runtime.server.settings import FrontendSettings

    for name, value in vars(args).items():
        text = " ".join(value) if isinstance(value, list) else str(value)
        if printable(text) != text:  # HTTP processes and clients are told of it as JSON
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {printable(text)} is not UTF-8; a server needs another name for it")
    return FrontendSettings(
        host=args.host,
        port=args.port,
        grpc_port=grpc_port,
        num_processes=_default_http_processes() if args.http_processes is None else args.http_processes,
        model_names=model_names(args),
        api_key_file=None if args.api_key_file is None else str(args.api_key_file),
        ssl_certfile=None if args.ssl_certfile is None else str(args.ssl_certfile),
        ssl_keyfile=None if args.ssl_keyfile is None else str(args.ssl_keyfile),
        admin_key_file=None if args.admin_key_file is None else str(args.admin_key_file),
        insecure=args.insecure,
        request_timeout_seconds=args.request_timeout,
        stall_seconds=min(STALLED_HEALTH_SECONDS, args.stall_timeout / 2),
        silence_seconds=min(Limits().silence, args.stall_timeout),
        starting_silence_seconds=args.stall_timeout,
        metrics_compatibility=tuple(args.metrics_compatibility),
        tool_call_parser=args.tool_call_parser,
        cors_origins=tuple(args.cors_origin),
        log_level=log_level(args),
        log_format=log_format(args),
    )


def _default_http_processes() -> int:
    """One process streams more tokens than four processors compute, so that share leaves the rest to the ranks."""
    return max(1, min(MAX_DEFAULT_HTTP_PROCESSES, len(os.sched_getaffinity(0)) // 4))


def _grpc_port(args: argparse.Namespace) -> tuple[int | None, str]:
    """Where gRPC is served, or why nowhere. Asked for, it must work; otherwise the server starts without it and its start block says so.

    Raises:
        ConfigError: ``--grpc-port`` is given, and the port or the libraries are not there.
    """
    from phalanx.runtime.server.web.listener import free_port

    given, port = args.grpc_port, GRPC_PORT if args.grpc_port is None else args.grpc_port
    if given is None and args.port == 0:
        return None, ""
    try:
        if not (find_spec("grpc") and find_spec("tritonclient")):
            raise ConfigError(
                f"--grpc-port {port} needs grpcio and tritonclient; install the extra [grpc] in Phalanx's checkout "
                "(pip install -e '.[grpc]')"
            )
        return port if given == 0 else free_port(args.host, port), ""
    except ConfigError as error:
        if given is not None:
            raise
        return None, str(error)
