# SPDX-License-Identifier: Apache-2.0
"""Logging that never holds up the event loop: a thread writes, and lines beyond its queue are dropped. The line of a request."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
import re
import threading
import uuid
from typing import TextIO

from phalanx.runtime.logs import LogFormat, LogLevel, fields, formatter

__all__ = ["hold_log", "log_request", "request_id", "start_logging"]

_LOG = logging.getLogger("phalanx.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

MAX_WAITING_LINES = 10_000


_may_write = threading.Event()
_may_write.set()


def hold_log(hold: bool) -> None:
    """Let lines wait in the queue, or have them written again."""
    if hold:
        _may_write.clear()
    else:
        _may_write.set()


class _PatientHandler(logging.StreamHandler[TextIO]):
    """Writes in the thread of the log, when it may."""

    def emit(self, record: logging.LogRecord) -> None:
        _may_write.wait()
        super().emit(record)


class _DroppingHandler(logging.handlers.QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


def start_logging(stream: TextIO, level: LogLevel, log_format: LogFormat) -> logging.handlers.QueueListener:
    """Send this process's log, from ``level`` on, to ``stream``; `stop` the result to write what still waits."""
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    writer = _PatientHandler(stream)
    writer.setFormatter(formatter(log_format, logging.Formatter("%(asctime)s %(name)s %(message)s")))
    listener = logging.handlers.QueueListener(waiting, writer)
    listener.start()
    root = logging.getLogger()
    root.addHandler(_DroppingHandler(waiting))
    root.setLevel(level.upper())
    return listener


def request_id(given: str) -> str:
    """Return the id that a client gave in ``x-request-id``, or another one where that could not stand in a header or a log."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def log_request(request_id: str, method: str, path: str, status: int | str, seconds: float, *, is_probe: bool) -> None:
    """Write the line of a request that is over; of a probe, which comes every few seconds, at the level ``debug`` only."""
    _LOG.log(
        logging.DEBUG if is_probe else logging.INFO,
        "%s %s %s %s %.3fs", request_id, method, path, status, seconds,
        extra=fields(request_id=request_id, method=method, path=path, status=status, seconds=round(seconds, 6)),
    )  # fmt: skip
