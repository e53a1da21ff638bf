# SPDX-License-Identifier: Apache-2.0
"""Starting MPI: every rank must come, and one that waits in vain says so and ends.

MPI's start waits for all ranks and holds the interpreter's lock, so no Python code of this process can run meanwhile: no signal
handler, no timer thread. Signals therefore keep their default action, a process that a signal ends is noticed by every launcher,
and the one message is written by a child.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path

from phalanx.parallel import start_messenger
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import RANK_VARIABLES, LaunchInfo
from phalanx.parallel.start_messenger import answer

__all__ = ["START_SECONDS", "START_SECONDS_VARIABLE", "ULFM_VARIABLE", "start_seconds", "waiting_for_all_ranks"]

START_SECONDS = 120.0
START_SECONDS_VARIABLE = "PHALANX_MPI_START_SECONDS"
_GRACE_SECONDS = 0.5
"""Between the message and the end of the process."""
_HYDRA_VARIABLE = "HYDI_CONTROL_FD"
ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"
"""1 under Open MPI's ``mpirun --with-ft ulfm``."""
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
_MESSENGERS = 2
"""Of each host: with the first ranks that come, in case one of them ends."""


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
def waiting_for_all_ranks(info: LaunchInfo, catches_usr1: bool = False) -> Iterator[None]:
    """Run MPI's start inside: a signal ends this process at once, and so does a rank that does not come in time.

    Args:
        catches_usr1: the library catches SIGUSR1 from somewhere in its start on and drops it, as MPICH does, unless there was a handler. It
            then ends this process after the start.
    """
    if info.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = start_seconds()
    with ExitStack() as places:
        messenger = None
        with contextlib.suppress(OSError):  # it is an aid
            messenger = _start_messenger(info, seconds, places)
        try:
            with _usr1_kept() if catches_usr1 else nullcontext(), _ending_after(seconds + _GRACE_SECONDS, catches_usr1):
                yield
        finally:
            if messenger is not None:
                messenger.communicate(b"+")


@contextmanager
def _usr1_kept() -> Iterator[None]:
    """A SIGUSR1 that comes meanwhile comes again afterwards."""
    told: list[int] = []
    handler = signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL if handler is None else handler)
        if told:
            signal.raise_signal(signal.SIGUSR1)


@contextmanager
def _ending_after(seconds: float, spares_usr1: bool) -> Iterator[None]:
    """Signals end this process at once meanwhile, and so does the clock."""
    # The kernel spares the first process of a container from signals without a handler, and Python's cannot run.
    is_first_process = os.getpid() == 1
    if is_first_process:
        faulthandler.dump_traceback_later(seconds, exit=True)
    numbers = [number for number in _ENDING_SIGNALS if not (spares_usr1 and number == signal.SIGUSR1)]
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if is_first_process:
            faulthandler.cancel_dump_traceback_later()


def _start_messenger(info: LaunchInfo, seconds: float, places: ExitStack) -> subprocess.Popen[bytes] | None:
    """A child that speaks when ``seconds`` have passed, or a rank has ended, and is silent when it reads a byte before.

    Lists this rank among those that have come, until ``places`` are left. None if the host has its messengers.
    """
    deadline, agent = time.monotonic() + seconds, _agent()
    key = _key(agent)
    _take(places, key, str(info.rank))
    if not any(_take(places, key, f"messenger {number}:") for number in range(_MESSENGERS)):
        return None
    way_out = (
        f"look for its message, run phalanx doctor on each host, or set {START_SECONDS_VARIABLE} if hosts are slow"
    )
    # Others end a job for a rank that ends before MPI, unless ranks may be lost. In a container the agent may be out of sight.
    is_tolerant = _HYDRA_VARIABLE in os.environ or os.environ.get(ULFM_VARIABLE) == "1"
    is_looked_at = is_tolerant and agent > 1 and os.path.exists(f"/proc/{agent}/task/{agent}/children")
    words = (
        os.getpid(), info.rank, info.size, info.local_size, f"{seconds:g}", deadline, key, agent if is_looked_at else 0,
        int(_sees_all(agent)), way_out,
    )  # fmt: skip
    command = [sys.executable, "-ISE", start_messenger.__file__, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _take(places: ExitStack, key: str, what: str) -> bool:
    """Be listed under ``what`` until ``places`` are left; whether the name was free."""
    place = answer(key, what)
    if place is not None:
        places.enter_context(place)
    return place is not None


def _key(agent: int) -> str:
    """What tells this job from others on this host. Names of sockets are short, and a process has its number in one namespace only."""
    job = os.environ.get("PMIX_NAMESPACE", str(agent))
    return blake2b(f"{job} {_namespace('self', 'pid')}".encode(), digest_size=8).hexdigest()


def _sees_all(agent: int) -> bool:
    """Whether the ranks of this host see each other's names: containers of their own would keep them from it."""
    return agent > 1 and _namespace(agent, "net") in ("", _namespace("self", "net"))


def _namespace(pid: int | str, kind: str) -> str:
    """The name of a process's namespace; empty if it is not to be seen."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return ""


def _agent() -> int:
    """The launcher's process on this host: the first ancestor that it has not given a rank."""
    variable = next((name for name in RANK_VARIABLES if name in os.environ), "").encode() + b"="
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1 and b"\0" + variable in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid
