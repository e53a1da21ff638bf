# SPDX-License-Identifier: Apache-2.0
"""How a server is told to end: by signals, or by the admin route."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from phalanx.launch.signals import heard, interruption
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.parallel.liveness.watch import RankWatch

__all__ = ["DrainSignals"]

DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_DRAINING = b"phalanx: draining: open requests are answered, new ones refused; Ctrl-C again ends at once\n"


class DrainSignals:
    """SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C end the server once open requests are answered, or after a limit; a second one at once.

    While ranks still load, those but Ctrl-C end the job with status 0: no request was accepted.

    Launchers send a signal to every rank: rank 0 acts on it, the others leave when rank 0 says so.

    Args:
        watch: ends the ranks when requests take longer than ``limit_seconds``, or are not waited for.
        is_supervised: only SIGUSR1 counts for a second signal. A supervisor passes on the signals that it gets as that one, while
            Slurm and service managers send SIGTERM to its ranks as well.
    """

    def __init__(self, watch: RankWatch, limit_seconds: float, *, is_supervised: bool = False) -> None:
        self._drain: Callable[[], None] | None = None
        self._watch, self._limit = watch, limit_seconds
        self._is_supervised = is_supervised
        self._num_counted = 0
        self._is_told = False

    @staticmethod
    def ignore() -> None:
        """On ranks other than 0."""
        for number in DRAIN_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def catch(self) -> None:
        """On rank 0, instead of the handlers that end a command which has nothing to drain.

        Raises:
            KeyboardInterrupt: such a handler had a signal and waits for the end of an import.
        """
        if interruption() is not None:
            raise KeyboardInterrupt
        for number in heard(DRAIN_SIGNALS):
            signal.signal(number, self._handle)

    def on_drain(self, drain: Callable[[], None]) -> None:
        """What to do from now on; done at once when a signal came earlier."""
        self._drain = drain
        if self._is_told:
            self._start_drain()

    @staticmethod
    def check_limit(limit_seconds: float) -> None:
        """Raise ConfigError for a limit that no drain can keep."""
        if not 0 <= limit_seconds < 1e9:
            raise ConfigError(f"--shutdown-timeout={limit_seconds:g} is out of range; use seconds from 0 (default 25)")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._num_counted += not self._is_supervised or number == signal.SIGUSR1
        # A hook that asks by the admin route may be followed by SIGTERM; Ctrl-C comes from someone who waits.
        is_again = self._num_counted > 1 or (self._is_told and number == signal.SIGINT and not self._is_supervised)
        if number == signal.SIGINT and (is_again or self._drain is None):
            raise KeyboardInterrupt
        if is_again:
            self._watch.end_by(0.0, 128 + number, "told again to end: open requests are not waited for")
        elif self._drain is None and not self._is_told:
            self._is_told = True
            self._watch.end_by(0.0, 0, "told to end while ranks load")
        else:
            self.drain()

    def drain(self) -> None:
        """What the first signal does; nothing after one. For the admin route, on the thread that handles signals.

        It does not count as a signal: Kubernetes sends SIGTERM after a `preStop` hook that asks for a drain, and the open requests
        are still waited for. Ctrl-C after it does not wait.
        """
        if self._is_told:
            return
        self._is_told = True
        if self._drain is not None:
            self._start_drain()

    def _start_drain(self) -> None:
        assert self._drain is not None
        with contextlib.suppress(OSError):  # of a terminal that was closed
            os.write(sys.stderr.fileno(), _DRAINING)  # a handler must not enter the buffered stream
        self._watch.end_by(self._limit, 1, f"open requests did not end within --shutdown-timeout={self._limit:g} s")
        self._drain()
