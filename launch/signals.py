"""What Ctrl-C, SIGTERM and SIGUSR1 do to a command: all ranks end, with 128 + the signal's number, and no traceback.

Before MPI is up the signals keep their default action, which ends this process: whatever a Python handler did then, a rank that
waits in MPI's start could not run it, while a process that a signal ended is noticed by every launcher. From then on rank 0
leaves at once and the others give it time, so that it can save what is finished; the job then ends by rank 0's abort.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["PRECEDENCE_SECONDS", "Interruption", "catch_signals", "interruption", "leave_signals_alone"]

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PRECEDENCE_SECONDS = 2.0
"""How long ranks above 0 wait for rank 0 to end the job."""
LAST_SECONDS = 10.0
"""How long rank 0 may save what is finished. It is also the way out where a library swallowed the interrupt."""


class Interruption:
    """The handler of the ending signals, and the memory of one that came.

    Attributes:
        status: what the process must exit with; None = no signal came.
    """

    def __init__(self, rank: int) -> None:
        self.status: int | None = None
        self._rank = rank

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.status is not None:
            self._end()
        self.status = 128 + number
        sys.unraisablehook = lambda _: None  # an interrupt inside a destructor is not worth a traceback
        signal.signal(signal.SIGALRM, lambda *_: self._end())
        signal.setitimer(signal.ITIMER_REAL, PRECEDENCE_SECONDS if self._rank else LAST_SECONDS)
        if self._rank == 0:
            raise KeyboardInterrupt

    def _end(self) -> None:
        from phalanx.parallel.mpi_comm import abort_world, mpi_is_up

        status = self.status or 1
        if mpi_is_up():
            abort_world(status)
        os._exit(status)


def leave_signals_alone() -> None:
    """Give the ending signals their default action: before MPI is up, and when nothing is left to save."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def catch_signals(rank: int) -> None:
    """Handle them from now on, if this process runs a command (a test or a script keeps its own handlers)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        handler = Interruption(rank)
        for number in ENDING_SIGNALS:
            signal.signal(number, handler)


def interruption() -> int | None:
    """The status that a signal asks for; None = none came."""
    handler = signal.getsignal(signal.SIGINT)
    return handler.status if isinstance(handler, Interruption) else None
