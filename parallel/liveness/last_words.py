# SPDX-License-Identifier: Apache-2.0
"""What a job that ends still does, each in limited time: a pipe that nobody reads or a file server that does not answer must not keep it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["keep_report", "say", "within"]

SAY_SECONDS = 1.0
"""How long a full pipe may hold up the end of the job."""
KEEP_SECONDS = 2.0
KEPT_REPORTS = 20


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``, and go on when it is done, has failed, or takes longer than ``seconds``."""
    thread = threading.Thread(target=work, name="last words", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads for this user: better late than not at all
        with contextlib.suppress(Exception):
            work()
        return
    thread.join(seconds)


def keep_report(directory: Path | None, text: str) -> list[str]:
    """Write a report to a file of its own; returns a line that says where, if there is a directory for it."""
    if directory is None:
        return []
    said: list[str] = []
    within(KEEP_SECONDS, lambda: said.append(_keep(directory, text)))
    return [f"phalanx: {line}" for line in said] or [
        f"phalanx: the report could not be kept in {directory} within {KEEP_SECONDS:g} s"
    ]


def _keep(directory: Path, text: str) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        when = time.strftime("%Y-%m-%dT%H-%M-%S")
        path = directory / f"{when}-{socket.gethostname()}-{os.getpid()}.txt"
        path.write_bytes(_encoded(text))
        for old in sorted(directory.glob("*.txt"))[:-KEPT_REPORTS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        return f"the report could not be kept in {directory}: {error.strerror}"
    return f"this report is kept in {path}"


def say(text: str) -> None:
    """Write to standard error in whole pages, so that short texts of several ranks do not mix; what a reader does not take in time is left out.

    A pipe with room for a page is ready, but a longer write would wait for its reader.
    """
    descriptor, rest, deadline = sys.stderr.fileno(), _encoded(text), time.monotonic() + SAY_SECONDS
    with contextlib.suppress(OSError):
        while rest and select.select([], [descriptor], [], max(0.0, deadline - time.monotonic()))[1]:
            rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]


def _encoded(text: str) -> bytes:
    """A line's bytes in every locale; names of files need not be UTF-8."""
    return f"{text}\n".encode(errors="backslashreplace")
