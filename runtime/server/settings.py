# SPDX-License-Identifier: Apache-2.0
"""What the operator chose for the HTTP side, handed to its process as one value."""

from __future__ import annotations

import ipaddress
import re

import msgspec

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.logs import LogFormat, LogLevel

__all__ = ["METRICS_OF", "TOOL_CALL_PARSERS", "FrontendSettings"]

METRICS_OF = ("vllm", "triton")
"""Servers whose names of metrics are known."""

TOOL_CALL_PARSERS = (
    "auto", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "glm45", "deepseek_v3", "none",
)  # fmt: skip
"""The forms of tool calls that can be read; ``auto`` takes the one that the chat template teaches."""


MAX_PROCESSES = 64

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+|null")


class FrontendSettings(msgspec.Struct, frozen=True):
    """Limits in bytes and seconds; the defaults are Triton's and vLLM's where they have one.

    Attributes:
        port: 0 = any free one.
        num_processes: HTTP processes that share the port.
        max_connections: most connections of one of them.
        grpc_port: where Triton's gRPC protocol is served; None = nowhere.
        model_names: under which requests may ask for the model; the first one is shown.
        api_key_file: one key per line; None = no key needed.
        ssl_certfile, ssl_keyfile: serve HTTPS and secure gRPC with this certificate chain and its key (PEM); None = neither.
        admin_key_file: keys of the admin routes; None = the API keys.
        insecure: serve other machines without a key.
        request_timeout_seconds: maximum duration of a request; None = no limit.
        metrics_compatibility: members of `METRICS_OF`: servers under whose names metrics are shown, too.
        tool_call_parser: one of `TOOL_CALL_PARSERS`: how the model writes tool calls.
        cors_origins: origins whose pages may ask from a browser; ``*`` = any.
        log_level, log_format: of the log on standard error; requests are logged at ``info``, probes at ``debug``.
        stall_seconds: ``/health`` fails when no step has finished for so long while there is work.
        silence_seconds, starting_silence_seconds: how long rank 0 may give no sign of life; the second while ranks load.
        keep_alive_seconds: how long an idle connection stays open: longer than the pools of proxies (60 to 90 s), so that they
            close first and never send a request into a closing connection.
        unread_seconds, draining_unread_seconds: how long a client that reads nothing of its answer keeps its connection; the
            second while the server drains.

    Raises:
        ConfigError: a value is out of range, or the server would be open to other machines without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    model_names: tuple[str, ...] = ("phalanx",)
    api_key_file: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    admin_key_file: str | None = None
    insecure: bool = False
    request_timeout_seconds: float | None = None
    stall_seconds: float = 60.0
    silence_seconds: float = 30.0
    starting_silence_seconds: float = 300.0
    metrics_compatibility: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    cors_origins: tuple[str, ...] = ()
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    max_body_bytes: int = 64 << 20
    max_body_chunks: int = 65_536
    max_header_bytes: int = 64 << 10
    header_timeout_seconds: float = 30.0
    body_timeout_seconds: float = 30.0
    max_connections: int = 8192
    num_processes: int = 1
    keep_alive_seconds: int = 120
    unread_seconds: float = 30.0
    draining_unread_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port={self.port} is not a valid TCP port; use 0 (any free one) to 65535")
        if not self.host.strip() or "/" in self.host:
            raise ConfigError(
                f"--host={self.host!r} is not an address; use 127.0.0.1, 0.0.0.0 (all) or a name, without http://"
            )
        if not all(name.strip() for name in self.model_names):
            raise ConfigError("--served-model-name holds an empty name; leave it out for the directory's")
        if self.grpc_port is not None and (not 0 <= self.grpc_port <= 65_535 or self.grpc_port == self.port != 0):
            raise ConfigError(
                f"--grpc-port={self.grpc_port} is not a valid TCP port, or the same as --port; use 0 (any free one) to 65535"
            )
        if not 1 <= self.num_processes <= MAX_PROCESSES:
            raise ConfigError(f"--http-processes={self.num_processes} is out of range; use 1 to {MAX_PROCESSES}")
        if self.request_timeout_seconds is not None and not 0 < self.request_timeout_seconds < 1e9:
            raise ConfigError(
                f"--request-timeout={self.request_timeout_seconds} is out of range; use seconds above 0, "
                "or leave it out for no limit"
            )
        for server in self.metrics_compatibility:
            if server not in METRICS_OF:
                raise ConfigError(
                    f"--metrics-compatibility={server} is not known; use one or more of {', '.join(METRICS_OF)}"
                )
        if self.tool_call_parser not in TOOL_CALL_PARSERS:
            raise ConfigError(
                f"--tool-call-parser={self.tool_call_parser} is not known; use one of {', '.join(TOOL_CALL_PARSERS)}"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin={origin} is not an origin; use https://HOST, http://HOST:PORT or * without a path"
                )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given, missing = ("--ssl-certfile", "--ssl-keyfile")[:: -1 if self.ssl_certfile is None else 1]
            raise ConfigError(f"{given} is given without {missing}; TLS needs both")
        if not (self.api_key_file or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"--host={self.host} lets other machines in and there is no --api-key-file; give one, or say --insecure"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
