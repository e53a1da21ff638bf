# SPDX-License-Identifier: Apache-2.0
"""Rank 0's handle on the HTTP processes: open the port, start them, see them off."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from phalanx.parallel.errors import CommunicatorError, ConfigError, printable
from phalanx.runtime.server.board import create_board
from phalanx.runtime.server.link.channel import FrontendChannel, FrontendChannels
from phalanx.runtime.server.link.messages import Failed, Job, Phase, Pulse, Stop, Trouble
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.api_keys import read_api_keys
from phalanx.runtime.server.web.listener import answer_early, bind, free_port
from phalanx.runtime.server.web.tls import server_context

__all__ = ["Frontend"]

EXIT_SECONDS = 8.0


class _Place(msgspec.Struct):
    """``doors``: abstract Unix sockets, one for each HTTP process; ``job``: which of the supervisor's jobs may enter."""

    job: int
    url: str
    grpc_port: int | None
    without_grpc: str
    doors: list[str]


class Frontend:
    """Running HTTP processes and the engine's ends of the socket pairs.

    Attributes:
        url: where they listen.
        grpc_port: where they serve gRPC; None = nowhere.
        without_grpc: why they do not, although it was not declined; empty = they do, or it was.
        channels: messages to and from them.
    """

    def __init__(
        self,
        url: str,
        processes: Sequence[subprocess.Popen[bytes]],
        channels: FrontendChannels,
        grpc_port: int | None = None,
        doors: Sequence[str] = (),
    ) -> None:
        self._doors = list(doors)
        self.url = url
        self.grpc_port = grpc_port
        self.without_grpc = ""
        self.channels = channels
        self._processes = tuple(processes)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        settings: FrontendSettings,
        environment: Mapping[str, str] | None = None,
        *,
        outlives_engine: bool = False,
    ) -> Frontend:
        """Open the port and start ``settings.num_processes`` times ``command``, with the arguments of `process.main`.

        ``environment`` is that of the processes; None = ours. Returns at once; a thread answers 503 until the processes do. They get
        sessions of their own, so that a terminal's or a launcher's signals reach rank 0 only.

        ``outlives_engine``: for a supervisor. The channels lead to it, and engines `connect` to the `place`.

        Raises:
            ConfigError: the port, the key file or the certificate cannot be used.
        """
        read_api_keys(settings.api_key_file)
        tls = server_context(settings.ssl_certfile, settings.ssl_keyfile)
        read_api_keys(settings.admin_key_file, "--admin-key-file")
        if settings.grpc_port is not None:
            settings = msgspec.structs.replace(settings, grpc_port=free_port(settings.host, settings.grpc_port))
        listeners = bind(settings.host, settings.port, settings.num_processes)
        url = _url("http" if tls is None else "https", settings.host, listeners[0].getsockname()[1])
        board = create_board(settings.num_processes)
        started, starting = os.pipe()
        processes, channels, doors = [], [], []
        for number, listener in enumerate(listeners):
            ours, theirs = socket.socketpair()
            door = _engine_door() if outlives_engine else None
            engines = -1 if door is None else door.fileno()
            descriptors = (theirs.fileno(), engines, listener.fileno(), starting, board)
            encoded = msgspec.json.encode(settings).decode()
            process = subprocess.Popen(
                [*command, *map(str, (number, *descriptors)), encoded],
                pass_fds=[descriptor for descriptor in descriptors if descriptor >= 0],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            theirs.close()
            if door is not None:
                doors.append(door.getsockname().decode())
                door.close()
            processes.append(process)
            channels.append(FrontendChannel(ours, f"HTTP process {number} (pid {process.pid})"))
        os.close(starting)
        os.close(board)
        answer_early(listeners, started, tls)
        return cls(url, processes, FrontendChannels(channels), settings.grpc_port, doors)

    def place(self, job: int) -> str:
        """For `connect`, as text: where the engine of a job, counted from 1, finds the processes that outlive it."""
        return msgspec.json.encode(_Place(job, self.url, self.grpc_port, self.without_grpc, self._doors)).decode()

    def grpc_in_words(self) -> str:
        """Return the address of gRPC, or why there is none; empty if it was declined."""
        host = urlsplit(self.url).netloc.rpartition(":")[0]
        return (
            f"{host}:{self.grpc_port}"
            if self.grpc_port is not None
            else self.without_grpc and f"none: {self.without_grpc}"
        )

    @classmethod
    def connect(cls, place: str) -> Frontend:
        """What rank 0 holds under a supervisor: processes that run already.

        Raises:
            ConfigError: they cannot be reached.
        """
        known, channels = msgspec.json.decode(place, type=_Place), []
        for number, door in enumerate(known.doors):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(door)
            except OSError as error:
                sock.close()
                raise ConfigError(
                    f"HTTP process {number} of the supervisor cannot be reached ({error.strerror}); rank 0 must run on the "
                    "supervisor's host, in the same container"
                ) from None
            channels.append(FrontendChannel(sock, f"HTTP process {number}"))
        frontend = cls(known.url, (), FrontendChannels(channels), known.grpc_port)
        frontend.without_grpc = known.without_grpc
        with contextlib.suppress(CommunicatorError):
            frontend.channels.send(Job(known.job))
        return frontend

    def tell_failed(self, reason: str) -> None:
        """Have every open request end with this error. May be called by any thread; waits for a moment at most."""
        with contextlib.suppress(CommunicatorError):
            self.channels.send(Failed(printable(reason)))
        self.channels.flush(0.5)

    def tell_phase(self, text: str) -> None:
        """Have requests that come before the engine is ready be refused with these words."""
        with contextlib.suppress(CommunicatorError):
            self.channels.send(Phase(text))

    def tell_trouble(self, reason: str | None) -> None:
        """Have ``/health`` fail for this reason, or no longer. May be called by any thread."""
        with contextlib.suppress(CommunicatorError):
            self.channels.send(Trouble(reason))

    def tell_pulse(self) -> None:
        """Say that this process runs. May be called by any thread."""
        with contextlib.suppress(CommunicatorError):
            self.channels.send(Pulse())

    def abandon(self, reason: str) -> None:
        """The engine failed: let the processes tell their clients and exit by themselves; waits for a moment at most."""
        self.tell_failed(reason)
        self.channels.close()

    def stop(self) -> None:
        """Let the processes close their connections and exit; kill those that do not."""
        with contextlib.suppress(CommunicatorError):
            self.channels.send(Stop())
        self.channels.flush(1.0)
        self.channels.close()
        deadline = time.monotonic() + EXIT_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _engine_door() -> socket.socket:
    door = socket.socket(socket.AF_UNIX)
    door.bind("\0phalanx-front-" + secrets.token_hex(16))
    door.listen(1)
    return door


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
