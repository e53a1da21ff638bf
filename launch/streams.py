"""Standard streams that were closed before the start (``>&-``): nothing else may take their place, and no output is lost silently."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, NoReturn

__all__ = ["open_closed_streams"]


class _Closed(io.TextIOBase):
    """Standard output that is not there: nothing happens until something is written."""

    def write(self, text: str) -> NoReturn:
        raise OSError(errno.EBADF, "it is closed", "standard output")


def open_closed_streams() -> None:
    """Take the descriptors 0 to 2 that are free, which the next socket would get, and have Python's streams know.

    What is written to a closed standard error is gone, as its owner wished; to a closed standard output, an error.
    """
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
