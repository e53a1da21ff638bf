# SPDX-License-Identifier: Apache-2.0
"""Standard streams as a command finds them: closed (``>&-``), or in an encoding without the characters of a text."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, NoReturn

__all__ = ["drop_broken_streams", "prepare_streams"]


_ESCAPES = "phalanx.json-escapes"


class _Closed(io.TextIOBase):
    """Standard output that is not there: nothing happens until something is written."""

    def write(self, text: str) -> NoReturn:
        raise OSError(errno.EBADF, "it is closed", "standard output")


def prepare_streams() -> None:
    r"""Have no stream fail that a command could write to in another way.

    Free descriptors among 0 to 2, which the next socket would get, are taken. What is written to a closed standard error is gone, as its
    owner wished; to a closed standard output, an error. Characters that an encoding lacks are written as JSON escapes (``\u65e5``).
    """
    codecs.register_error(_ESCAPES, _escaped)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor is this one
    given: Any = sys
    if sys.stderr is None:
        given.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        given.stdout = _Closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def drop_broken_streams() -> None:
    """Send standard output and error nowhere where their reader is gone: a process started from now on would die of them."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)  # errors are told unasked
        if poll.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4)), error.end
