# SPDX-License-Identifier: Apache-2.0
"""What rank 0 of a server shows to clients, from its start to its end."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

from phalanx.launch.announcement import Announcement
from phalanx.launch.drain import DrainSignals
from phalanx.launch.front import model_names, start_frontend
from phalanx.launch.supervise import PLACE_VARIABLE
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from phalanx.runtime.server.link.frontend import Frontend

__all__ = ["ServerFront"]

_LOG = logging.getLogger("phalanx.serve")


class ServerFront:
    """The HTTP processes and the announcement of their address. Only rank 0 opens it; unopened, it does nothing.

    Attributes:
        key_file: keys that requests need; None = none.
    """

    frontend: Frontend | None = None
    announcement: Announcement | None = None
    key_file: Path | None = None

    def open(self, args: argparse.Namespace) -> None:
        """Start the HTTP processes.

        Raises:
            ConfigError: an address, a key file or the endpoint file cannot be used.
        """
        from phalanx.runtime.server.link.frontend import Frontend

        DrainSignals.check_limit(args.shutdown_timeout)
        self.announcement = Announcement(model_names(args)[0], args.endpoint_file)
        self.key_file = args.api_key_file
        if (place := os.environ.get(PLACE_VARIABLE)) is not None:
            self.frontend = Frontend.connect(place)
            return
        if args.supervise:
            raise ConfigError(
                "--supervise starts the ranks itself; start it once, without mpirun or srun: phalanx serve --supervise -n 8"
            )
        self.frontend = start_frontend(args)

    def close(self) -> None:
        """End the HTTP processes once all requests are answered."""
        if self.announcement is not None and (reason := self.announcement.withdraw()):
            _LOG.warning("%s", reason)
        if self.frontend is not None:
            self.frontend.stop()

    def tell_failed(self, reason: str) -> None:
        """Tell open requests why they get no answer, from any thread; the process ends next."""
        if self.frontend is not None:
            self.frontend.tell_failed(reason)
        if self.announcement is not None:
            self.announcement.withdraw()

    def tell_phase(self, phase: str) -> None:
        """Say what the ranks are doing, to requests that come before the engine is ready."""
        if self.frontend is not None:
            self.frontend.tell_phase(phase)

    def tell_trouble(self, reason: str | None) -> None:
        """Have ``/health`` fail for this reason, or no longer, from any thread."""
        if self.frontend is not None:
            self.frontend.tell_trouble(reason)

    def tell_pulse(self) -> None:
        """Say that this process runs, from any thread."""
        if self.frontend is not None:
            self.frontend.tell_pulse()

    def abandon(self, reason: str) -> None:
        """Tell open requests why they get no answer."""
        if self.frontend is not None:
            self.frontend.abandon(reason)
        if self.announcement is not None:
            self.announcement.withdraw()
