# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 do to a command: all ranks end, with 128 + the signal's number, and no traceback.

Before MPI is up the signals keep their default action, which ends this process: whatever a Python handler did then, a rank that
waits in MPI's start could not run it, while a process that a signal ended is noticed by every launcher. From then on rank 0
leaves at once and the others give it time, so that it can save what is finished; the job then ends by rank 0's abort.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

__all__ = ["PRECEDENCE_SECONDS", "Interruption", "catch_signals", "heard", "interruption", "leave_signals_alone"]

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
"""The one whose handler `interruption` looks at is the last to lose it."""
PRECEDENCE_SECONDS = 2.0
"""How long ranks above 0 wait for rank 0 to end the job."""
LAST_SECONDS = 10.0
"""How long rank 0 may save what is finished. It is also the way out where a library swallowed the interrupt."""
_IMPORT_SECONDS = 0.02
"""After so long an interrupt that came during an import is tried again."""
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Interruption:
    """The handler of the ending signals, and the memory of one that came.

    An import is not interrupted: extension modules print what stops theirs, as a traceback.

    Attributes:
        status: what the process must exit with; None = no signal came.
    """

    def __init__(self, rank: int) -> None:
        self.status: int | None = None
        self._rank = rank
        self._deadline = 0.0
        self._has_raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.status is not None:
            self._end()
        self.status = 128 + number
        sys.unraisablehook = lambda _: None  # an interrupt inside a destructor is not worth a traceback
        self._deadline = time.monotonic() + (PRECEDENCE_SECONDS if self._rank else LAST_SECONDS)
        signal.signal(signal.SIGALRM, self._on_alarm)
        self._interrupt(frame)

    def leave(self) -> None:
        """The command has ended by itself: no interrupt any more, and as long as ever until the interpreter must be gone."""
        self._has_raised = True
        if self.status is not None:
            signal.setitimer(signal.ITIMER_REAL, LAST_SECONDS)

    def _on_alarm(self, _: int, frame: FrameType | None) -> None:
        if self._has_raised or time.monotonic() >= self._deadline:
            self._end()
        self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        """Interrupt rank 0, now or when the import that ``frame`` is part of has ended; the others wait for it to end them."""
        left = max(self._deadline - time.monotonic(), 1e-6)
        is_later = self._rank == 0 and _is_importing(frame)
        signal.setitimer(signal.ITIMER_REAL, min(left, _IMPORT_SECONDS) if is_later else left)
        if self._rank == 0 and not is_later:
            self._has_raised = True
            raise KeyboardInterrupt

    def _end(self) -> None:
        from phalanx.parallel.mpi_comm import abort_world, mpi_is_up

        status = self.status or 1
        if mpi_is_up():
            abort_world(status)
        os._exit(status)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None


def heard(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """``numbers`` without SIGHUP where that is ignored: under nohup the process is to outlive its terminal."""
    return [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def leave_signals_alone() -> None:
    """Give the ending signals their default action: before MPI is up, and when nothing is left to save."""
    if isinstance(handler := signal.getsignal(signal.SIGINT), Interruption):
        handler.leave()
    for number in heard(ENDING_SIGNALS):
        signal.signal(number, signal.SIG_DFL)


def catch_signals(rank: int) -> None:
    """Handle them from now on, if this process runs a command (a test or a script keeps its own handlers)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        handler = Interruption(rank)
        for number in heard(ENDING_SIGNALS):
            signal.signal(number, handler)


def interruption() -> int | None:
    """The status that a signal asks for; None = none came."""
    handler = signal.getsignal(signal.SIGINT)
    return handler.status if isinstance(handler, Interruption) else None
