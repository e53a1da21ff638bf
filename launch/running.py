# SPDX-License-Identifier: Apache-2.0
"""How every command starts and ends.

Exit status: 0 done; 2 the user's mistake (one line on standard error, from one rank only); 128 + N ended by signal N; 1 anything
else, with rank, phase and cause. Heavy imports happen inside functions: ``--help`` answers without NumPy, MPI or a GPU.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import sys
import termios
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from phalanx.launch.parser import CommandParser, UsageError
from phalanx.launch.settings import Settings
from phalanx.launch.sharing import agree
from phalanx.launch.signals import PRECEDENCE_SECONDS, catch_signals, interruption, leave_signals_alone
from phalanx.launch.streams import prepare_streams
from phalanx.parallel.errors import CheckpointError, ConfigError, EndedElsewhereError, RequestError
from phalanx.parallel.launcher import forget_launcher, launch_info

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["job_arguments", "own_arguments", "run_command"]

SPOKESMAN_SECONDS = 1.0
"""How long other ranks that found the same mistake stay, because some launchers end a job with the first rank that exits:
rank 0 must have spoken by then."""
READER_SECONDS = 1.0
"""How long a rank that ends the job waits for its launcher to read what it said."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_WAYS_OUT = {
    errno.EBADF: "send it to a file or to /dev/null",
    errno.EROFS: "give another path; PHALANX_CACHE_DIR is that of kernels and timings",
}
_ANSWERED_ALONE = ("-h", "--help", "--version")


def job_arguments(
    parser: CommandParser,
    argv: Sequence[str] | None,
    on_rank_0: Callable[[argparse.Namespace], None] = lambda _: None,
) -> tuple[argparse.Namespace, Communicator]:
    """The arguments of a command that works on all ranks, and those ranks. *Collective.*

    Rank 0's command line, environment and configuration file count, on every rank: other hosts may have other ones.

    Args:
        on_rank_0: called there with the arguments, before any rank is waited for.

    Raises:
        ConfigError: a mistake in the arguments, found here or on rank 0.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word in words for word in _ANSWERED_ALONE):
        parser.parse_args(words)
    if launch_info().launcher is not None:
        _die_with_launcher()
    settings, mistake = Settings(()), None
    if launch_info().rank == 0:
        try:
            settings = Settings.read(words, parser.command)
            on_rank_0(parser.parse_settings(settings))
        except (ConfigError, CheckpointError, RequestError) as error:
            mistake = error
        if mistake is not None and launch_info().size == 1:
            raise mistake

    from phalanx.parallel.mpi_comm import world_communicator

    world = world_communicator()
    catch_signals(world.rank)

    def tell() -> bytes:
        if mistake is not None:
            raise mistake
        return settings.encode()

    return parser.parse_settings(Settings.decode(agree(world, tell))), world


def _die_with_launcher() -> None:
    """End this rank when its launcher dies. Open MPI's ranks would stay: those that wait do not notice."""
    from phalanx.parallel.parent import signal_when_parent_dies

    signal_when_parent_dies(signal.SIGKILL)


def own_arguments(parser: CommandParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command that needs one process: under a launcher rank 0 works, the others leave.

    Raises:
        ConfigError: a mistake in the arguments.
    """
    if launch_info().rank:
        raise SystemExit(0)
    forget_launcher()
    catch_signals(rank=0)
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word in words for word in _ANSWERED_ALONE):
        parser.parse_args(words)
    return parser.parse_settings(Settings.read(words, parser.command))


def run_command(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command's ``main`` and turn what it raises into the exit status, never leaving other ranks waiting."""
    prepare_streams()
    leave_signals_alone()
    if launch_info().size == 1:
        catch_signals(rank=0)
    _share_processors()
    try:
        try:
            status = command(argv) or 0
        except BaseException as error:
            _leave_with(error)
        _leave(status)
    except KeyboardInterrupt as late:  # a signal that came while the command was ending; a second one ends the process
        _leave_with(late)


def _leave_with(error: BaseException) -> NoReturn:
    """Say what is to be said about ``error`` and end this process, and the others where they do not know."""
    if (signalled := interruption()) is not None:
        _leave(signalled, abort=True)
    if isinstance(error, KeyboardInterrupt):
        _leave(130, abort=True)
    if isinstance(error, BrokenPipeError):
        _leave(1, abort=True)
    if isinstance(error, (ConfigError, CheckpointError, RequestError)):
        _leave(2, abort=_report_mistake(error))
    if isinstance(error, PermissionError) and error.filename is not None:
        place = f"{os.fsdecode(error.filename)!r} cannot be used: {error.strerror}"
        mistake = ConfigError(f"{place}; change its permissions or those of its parents, or give another path")
        _leave(2, abort=_report_mistake(mistake))
    if isinstance(error, SystemExit) and _is_agreed(error):
        _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    if isinstance(error, MemoryError):
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        size = "use smaller --num-kv-blocks, --max-num-seqs, --block-size or --max-num-batched-tokens; phalanx plan shows sizes"
        _leave(2, abort=_report_mistake(ConfigError(f"not enough memory{notes}{str(error) and f': {error}'}; {size}")))
    if isinstance(error, OSError) and error.errno in (*_DISK_ERRORS, *_WAYS_OUT):
        way_out = _WAYS_OUT.get(error.errno, "make room")
        sys.stderr.write(f"phalanx: {error.filename or 'the output'} cannot be written: {error.strerror}; {way_out}\n")
        _leave(1, abort=True)
    if isinstance(error, EndedElsewhereError):
        time.sleep(PRECEDENCE_SECONDS)
    _report_failure(error)
    _leave(1, abort=True)


def _is_agreed(exit_: SystemExit) -> bool:
    """Whether no rank waits for this one: it exits for all to see (``--help``), not in the middle of a command."""
    from phalanx.parallel.mpi_comm import mpi_is_up

    return launch_info().size == 1 or not (exit_.code or mpi_is_up())


def _share_processors() -> None:
    """One rank per core share: without this every rank's BLAS would start a thread per core."""
    info = launch_info()
    threads = max(1, len(os.sched_getaffinity(0)) // info.local_size)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))


def _report_mistake(error: Exception) -> bool:
    """One line from one rank; returns whether the others must be ended, because they do not know yet.

    What only one rank finds (a file that its host lacks) is said with its rank and host.
    """
    from phalanx.parallel.mpi_comm import all_ranks_failed

    is_everywhere = all_ranks_failed()
    if launch_info().rank == 0 or not is_everywhere:
        prefix = "" if isinstance(error, UsageError) else "phalanx: "
        if not is_everywhere:
            prefix += f"rank {launch_info().rank} on {socket.gethostname()}: "
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{prefix}{' '.join(str(error).split())}\n")
            sys.stderr.flush()
    return not is_everywhere


def _report_failure(error: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    with contextlib.suppress(OSError):  # a reader that is gone must not keep the others from being ended
        rank = f"rank {launch_info().rank} ({socket.gethostname()}, pid {os.getpid()})"
        sys.stderr.write(f"phalanx: {rank} failed{notes}: {type(error).__name__}: {error}\n")
        traceback.print_exc()
        sys.stderr.flush()


def _flush() -> bool:
    """Whether standard output took everything; if not, the interpreter must not try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"phalanx: standard output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _wait_for_reader() -> None:
    """Wait until standard error has been read, for a moment at most: MPICH's launcher does not look again once a job is aborted."""
    deadline, unread = time.monotonic() + READER_SECONDS, array.array("i", [1])
    with contextlib.suppress(OSError):
        while stat.S_ISFIFO(os.fstat(2).st_mode) and unread[0] and time.monotonic() < deadline:
            fcntl.ioctl(2, termios.FIONREAD, unread)
            time.sleep(0.001)


def _leave(status: int, abort: bool = False) -> NoReturn:
    leave_signals_alone()
    status = status if _flush() else status or 1
    if abort and launch_info().size > 1:
        from phalanx.parallel.mpi_comm import abort_world

        _wait_for_reader()
        abort_world(status)
    elif status and launch_info().rank:
        time.sleep(SPOKESMAN_SECONDS)
    raise SystemExit(status)
