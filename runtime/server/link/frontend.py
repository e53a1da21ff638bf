# SPDX-License-Identifier: Apache-2.0
"""Rank 0's handle on the HTTP process: open the port, start it, see it off."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence

import msgspec

from phalanx.parallel.errors import CommunicatorError
from phalanx.runtime.server.link.channel import FrontendChannel
from phalanx.runtime.server.link.messages import Failed, Phase, Stop, Trouble
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.api_keys import read_api_keys
from phalanx.runtime.server.web.listener import answer_early, bind, free_port

__all__ = ["Frontend"]

EXIT_SECONDS = 8.0


class Frontend:
    """A running HTTP process and the engine's end of the socket pair.

    Attributes:
        url: where it listens.
        grpc_port: where it serves gRPC; None = nowhere.
        channel: messages to and from it.
    """

    def __init__(
        self, url: str, process: subprocess.Popen[bytes], channel: FrontendChannel, grpc_port: int | None = None
    ) -> None:
        self.url = url
        self.grpc_port = grpc_port
        self.channel = channel
        self._process = process

    @classmethod
    def start(
        cls, command: Sequence[str], settings: FrontendSettings, environment: Mapping[str, str] | None = None
    ) -> Frontend:
        """Open the port and start ``command``, with three descriptors and the settings as its last arguments.

        ``environment`` is that of the process; None = ours. Returns at once; a thread answers 503 until the process does. The process gets a session of its own, so
        that a terminal's or a launcher's signals reach rank 0 only.

        Raises:
            ConfigError: the port or the key file cannot be had.
        """
        read_api_keys(settings.api_key_file)
        if settings.grpc_port is not None:
            settings = msgspec.structs.replace(settings, grpc_port=free_port(settings.host, settings.grpc_port))
        listener = bind(settings.host, settings.port)
        url = _url(settings.host, listener.getsockname()[1])
        ours, theirs = socket.socketpair()
        started, starting = os.pipe()
        descriptors = (theirs.fileno(), listener.fileno(), starting)
        encoded = msgspec.json.encode(settings).decode()
        process = subprocess.Popen(
            [*command, *map(str, descriptors), encoded],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        os.close(starting)
        answer_early(listener, started)
        return cls(url, process, FrontendChannel(ours), settings.grpc_port)

    def tell_failed(self, reason: str) -> None:
        """Have every open request end with this error. May be called by any thread; waits for a moment at most."""
        with contextlib.suppress(CommunicatorError):
            self.channel.send(Failed(reason))
            self.channel.flush(0.5)

    def tell_phase(self, text: str) -> None:
        """Have requests that come before the engine is ready be refused with these words."""
        with contextlib.suppress(CommunicatorError):
            self.channel.send(Phase(text))

    def tell_trouble(self, reason: str | None) -> None:
        """Have ``/health`` fail for this reason, or no longer. May be called by any thread."""
        with contextlib.suppress(CommunicatorError):
            self.channel.send(Trouble(reason))

    def abandon(self, reason: str) -> None:
        """The engine failed: let the process tell its clients and exit by itself; waits for a moment at most."""
        self.tell_failed(reason)
        self.channel.close()

    def stop(self) -> None:
        """Let the process close its connections and exit; kill it if it does not."""
        with contextlib.suppress(CommunicatorError):
            self.channel.send(Stop())
            self.channel.flush(1.0)
        self.channel.close()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
