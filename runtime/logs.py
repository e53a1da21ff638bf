# SPDX-License-Identifier: Apache-2.0
"""What a job says on standard error: lines for people, or one JSON object a line for machines.

The ``READY`` line, mistakes in the command line and reports of failures are always plain text and are never left out.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["LOG_FORMATS", "LOG_LEVELS", "LogFormat", "LogLevel", "configure", "fields", "formatter", "is_json"]

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)


class JsonLines(logging.Formatter):
    """``{"time", "level", "logger", "message"}`` and whatever `fields` added."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class PrefixedLines(logging.Formatter):
    """``phalanx: `` in front of each line."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"phalanx: {line}" for line in super().format(record).splitlines())


class _StandardError(logging.Handler):
    """Writes to what is standard error at the moment, and flushes: a launcher reads it through a pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # its reader is gone
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


def fields(**values: Any) -> Mapping[str, Any]:
    """Values for machines, to be passed as ``extra`` of a log call; text lines do not show them."""
    return {"fields": values}


def formatter(log_format: LogFormat, text: logging.Formatter) -> logging.Formatter:
    """The formatter of ``--log-format``; ``text`` is the one for people."""
    return JsonLines() if log_format == "json" else text


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Send this process's messages from ``level`` on to standard error."""
    handler = _StandardError()
    handler.setFormatter(formatter(log_format, PrefixedLines()))
    logger = logging.getLogger("phalanx")
    logger.handlers = [handler]
    logger.setLevel(level.upper())


def is_json() -> bool:
    """Whether machines read this process's messages."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger("phalanx").handlers)
