"""Starting MPI: every rank must come, and one that waits in vain says so and ends.

MPI's start waits for all ranks and holds the interpreter's lock, so no Python code of this process can run meanwhile: no signal
handler, no timer thread. Signals therefore keep their default action, a process that a signal ends is noticed by every launcher,
and the one message is written by a child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import LaunchInfo

__all__ = ["START_SECONDS", "START_SECONDS_VARIABLE", "start_seconds", "waiting_for_all_ranks"]

START_SECONDS = 120.0
START_SECONDS_VARIABLE = "PHALANX_MPI_START_SECONDS"
_GRACE_SECONDS = 0.5
"""Between the message and the end of the process."""
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
_MESSENGER = """
import select, sys
if not select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
    sys.stderr.write(sys.argv[2])
"""


def start_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """How long a rank waits for the others in MPI's start.

    Raises:
        ConfigError: the environment variable is not a positive number.
    """
    text = environ.get(START_SECONDS_VARIABLE, "")
    try:
        seconds = float(text or START_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise ConfigError(f"{START_SECONDS_VARIABLE}={text!r} is not a positive number of seconds; use for example 120")
    return seconds


@contextmanager
def waiting_for_all_ranks(info: LaunchInfo) -> Iterator[None]:
    """Run MPI's start inside: a signal ends this process at once, and so does a rank that does not come in time."""
    if info.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = start_seconds()
    messenger = _start_messenger(info, seconds) if info.local_rank == 0 else None
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in _ENDING_SIGNALS}
    timer = signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if messenger is not None:
            messenger.communicate()


def _start_messenger(info: LaunchInfo, seconds: float) -> subprocess.Popen[bytes]:
    """A child that speaks when ``seconds`` have passed and is silent when its standard input is closed before."""
    message = (
        f"phalanx: rank {info.rank} of {info.size}: MPI has not started within {seconds:g} s, because a rank did not come; "
        f"look for its message, run launch.doctor on each host, or set {START_SECONDS_VARIABLE} if hosts are slow\n"
    )
    command = [sys.executable, "-ISE", "-c", _MESSENGER, str(seconds), message]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
