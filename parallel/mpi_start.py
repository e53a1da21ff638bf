"""Starting MPI: every rank must come, and one that waits in vain says so and ends.

MPI's start waits for all ranks and holds the interpreter's lock, so no Python code of this process can run meanwhile: no signal
handler, no timer thread. Signals therefore keep their default action, a process that a signal ends is noticed by every launcher,
and the one message is written by a child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from phalanx.parallel import start_messenger
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import RANK_VARIABLES, LaunchInfo
from phalanx.parallel.start_messenger import answer

__all__ = ["START_SECONDS", "START_SECONDS_VARIABLE", "start_seconds", "waiting_for_all_ranks"]

START_SECONDS = 120.0
START_SECONDS_VARIABLE = "PHALANX_MPI_START_SECONDS"
_GRACE_SECONDS = 0.5
"""Between the message and the end of the process."""
_HYDRA_VARIABLE = "HYDI_CONTROL_FD"
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
_MESSENGERS = 2
"""On each host: the second speaks where the first rank is the one that does not come."""


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
    agent = _agent()
    key = os.environ.get("PMIX_NAMESPACE", str(agent))  # of this job alone, on this host
    place = answer(key, str(info.rank))
    messenger = _start_messenger(info, seconds, key, agent) if info.local_rank < _MESSENGERS else None
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in _ENDING_SIGNALS}
    timer = signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if messenger is not None:
            messenger.communicate(b"+")
        if place is not None:
            place.close()


def _start_messenger(info: LaunchInfo, seconds: float, key: str, agent: int) -> subprocess.Popen[bytes]:
    """A child that speaks when ``seconds`` have passed, or a rank has ended, and is silent when it reads a byte before."""
    way_out = f"look for its message, run launch.doctor on each host, or set {START_SECONDS_VARIABLE} if hosts are slow"
    # Hydra alone does not end a job for a rank that ends before MPI. In a container its process may be out of sight.
    is_looked_at = (
        _HYDRA_VARIABLE in os.environ and agent > 1 and os.path.exists(f"/proc/{agent}/task/{agent}/children")
    )
    numbers = (info.rank, info.size, info.local_size, seconds, key, agent if is_looked_at else 0)
    command = [sys.executable, "-ISE", start_messenger.__file__, *map(str, numbers), way_out]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _agent() -> int:
    """The launcher's process on this host: the first ancestor that it has not given a rank."""
    variable = next((name for name in RANK_VARIABLES if name in os.environ), "").encode() + b"="
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1 and b"\0" + variable in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid
