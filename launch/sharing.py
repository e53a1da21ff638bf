"""What rank 0 alone reads (flags, settings, files) and tells to all; what it finds wrong, every rank raises."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.parallel.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["STANDARD_INPUT", "agree", "check_writable", "read_input", "read_text"]

STANDARD_INPUT = Path("-")
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


def read_input(world: Communicator, flag: str, path: Path) -> bytes:
    """A file of the user's, read by rank 0, whose disk and standard input are the user's; ``-`` is standard input. *Collective.*

    Raises:
        ConfigError: rank 0 cannot read it.
    """
    return agree(world, lambda: _read(flag, path))


def read_text(world: Communicator, flag: str, path: Path) -> str:
    """Like `read_input`, as text: UTF-8, with or without a byte order mark. *Collective.*

    Raises:
        ConfigError: rank 0 cannot read it, or it is not UTF-8.
    """
    try:
        return read_input(world, flag, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path} is not UTF-8 (byte {error.start}); convert it first") from None


def _read(flag: str, path: Path) -> bytes:
    try:
        if path == STANDARD_INPUT:
            if sys.stdin is None:
                raise ConfigError(f"{flag} - means standard input, which is closed; give a file")
            return sys.stdin.buffer.read()
        return path.read_bytes()
    except IsADirectoryError:
        raise ConfigError(f"{flag} {path} is a directory; give a file, or - for standard input") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{flag} {path} cannot be read: {reason}; check the path") from None
