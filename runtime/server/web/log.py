# SPDX-License-Identifier: Apache-2.0
"""Logging that never holds up the event loop: a thread writes, and lines beyond its queue are dropped."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
import threading
from typing import TextIO

from phalanx.runtime.logs import LogFormat, LogLevel, formatter

__all__ = ["hold_log", "start_logging"]

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
