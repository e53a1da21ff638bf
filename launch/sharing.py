# SPDX-License-Identifier: Apache-2.0
"""What rank 0 alone reads (flags, settings, files) and tells to all; what it finds wrong, every rank raises."""

from __future__ import annotations

import codecs
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.parallel.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["STANDARD_STREAM", "agree", "check_writable", "read_input", "read_text"]

STANDARD_STREAM = Path("-")
SILENT_SECONDS = 5.0
"""How long input may keep us waiting without a word: its writer may never end."""
_FOUND, _MISTAKE = b"+", b"-"


def agree(world: Communicator, produce: Callable[[], bytes]) -> bytes:
    """What ``produce`` returns on rank 0, on every rank. *Collective.*

    Raises:
        ConfigError: ``produce`` raised a mistake of the user's on rank 0. It is raised again there, and its text on the others.
    """
    from phalanx.parallel.communicator import broadcast_bytes

    mistake: ValueError | None = None
    message = b""
    if world.rank == 0:
        try:
            message = _FOUND + produce()
        except (ConfigError, CheckpointError, RequestError) as error:
            mistake, message = error, _MISTAKE + str(error).encode(errors="replace")
    message = broadcast_bytes(world, message)
    if mistake is not None:
        raise mistake
    if message[:1] == _MISTAKE:
        raise ConfigError(message[1:].decode())
    return message[1:]


def check_writable(world: Communicator, flag: str, path: Path) -> None:
    """Find out before the work whether rank 0 can write ``path``; what it holds stays. *Collective.*

    Raises:
        ConfigError: it cannot.
    """

    def probe() -> bytes:
        is_new = not path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}; choose another place") from None
        if is_new:
            path.unlink()
        return b""

    agree(world, probe)


def require_one_rank(world: Communicator, command: str) -> None:
    """Refuse a launcher's ranks where one process does all the work.

    Raises:
        ConfigError: there are several.
    """
    if world.size > 1:
        raise ConfigError(
            f"{command} was started on {world.size} ranks; it needs one; start it without mpirun and srun"
        )


def read_input(world: Communicator, flag: str, path: Path, most: int = -1) -> bytes:
    """A file of the user's, read by rank 0, whose disk and standard input are the user's; ``-`` is standard input. *Collective.*

    ``most``: bytes to read, if not all.

    Raises:
        ConfigError: rank 0 cannot read it.
    """

    def read() -> bytes:
        with _waiting_is_said(flag, path):
            return _read(flag, path, most)

    return agree(world, read)


def read_text(world: Communicator, flag: str, path: Path, most: int = -1) -> str:
    """Like `read_input`, as text: UTF-8, with or without a byte order mark; less a character that ``most`` cuts. *Collective.*

    Raises:
        ConfigError: rank 0 cannot read it, or it is not UTF-8.
    """
    data = read_input(world, flag, path, most)
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) != most)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path} is not UTF-8 (byte {error.start}); convert it first") from None


@contextlib.contextmanager
def _waiting_is_said(flag: str, path: Path) -> Iterator[None]:
    text = (
        f"phalanx: waiting for the end of {flag} {path}; if nothing writes there, press Ctrl-C and give a file (Open MPI's mpirun "
        "does not pass on the end of its standard input)\n"
    )
    timer = threading.Timer(SILENT_SECONDS, lambda: sys.stderr.write(text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(flag: str, path: Path, most: int) -> bytes:
    try:
        if path == STANDARD_STREAM:
            if sys.stdin is None:
                raise ConfigError(f"{flag} - means standard input, which is closed; give a file")
            return sys.stdin.buffer.read(most)
        with path.open("rb") as file:
            return file.read(most)
    except IsADirectoryError:
        raise ConfigError(f"{flag} {path} is a directory; give a file, or - for standard input") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{flag} {path} cannot be read: {reason}; check the path") from None
