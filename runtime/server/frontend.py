# SPDX-License-Identifier: Apache-2.0
"""Rank 0's handle on the HTTP process: start it, wait for its port, see it off."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence

import msgspec

from phalanx.parallel.errors import CommunicatorError, ConfigError
from phalanx.runtime.server.channel import FrontendChannel
from phalanx.runtime.server.messages import Bound, Failed, FrontendRefused, Stop
from phalanx.runtime.server.settings import FrontendSettings

__all__ = ["Frontend"]

BIND_SECONDS = 60.0
EXIT_SECONDS = 8.0


class Frontend:
    """A running HTTP process and the engine's end of the socket pair."""

    def __init__(self, process: subprocess.Popen[bytes], channel: FrontendChannel, host: str) -> None:
        self._process = process
        self._host = host
        self.channel = channel

    @classmethod
    def start(cls, command: Sequence[str], settings: FrontendSettings) -> Frontend:
        """Start ``command`` with the socket and the settings as its last arguments; returns at once.

        It gets a session of its own, so that a terminal's or a launcher's signals reach rank 0 only.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [*command, str(theirs.fileno()), msgspec.json.encode(settings).decode()]
            process = subprocess.Popen(
                arguments, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
            )
        return cls(process, FrontendChannel(ours), settings.host)

    def wait_for_port(self) -> str:
        """The URL on which the process listens.

        Raises:
            ConfigError: the port or the key file cannot be had.
            CommunicatorError: the process ended or did not answer.
        """
        deadline = time.monotonic() + BIND_SECONDS
        while time.monotonic() < deadline:
            for message in self.channel.receive(deadline - time.monotonic()):
                if isinstance(message, FrontendRefused):
                    raise ConfigError(message.message)
                if isinstance(message, Bound):
                    host = f"[{self._host}]" if ":" in self._host else self._host
                    return f"http://{host}:{message.port}"
        raise CommunicatorError(f"the HTTP process did not open its port within {BIND_SECONDS:g} s")

    def abandon(self, reason: str) -> None:
        """The engine failed: let the process tell its clients and exit by itself; waits for a moment at most."""
        try:
            self.channel.send(Failed(reason))
            self.channel.flush(0.5)
        except CommunicatorError:
            pass
        self.channel.close()

    def stop(self) -> None:
        """Let the process close its connections and exit; kill it if it does not."""
        try:
            self.channel.send(Stop())
            self.channel.flush(1.0)
        except CommunicatorError:
            pass
        self.channel.close()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
