# SPDX-License-Identifier: Apache-2.0
"""The error tree, split by who must act.

    PhalanxError
    ├── ConfigError        (also ValueError)    the operator: a flag, a layout, a missing library; exit status 2
    ├── CheckpointError    (also ValueError)    the operator: a file on disk is missing, broken or not supported; exit status 2
    ├── RequestError       (also ValueError)    the client: a field of one request; HTTP 400
    ├── CapacityError                           transient, retry later: queue full, draining; HTTP 429 or 503
    ├── ExecutorError                           a bug or a device fault: the engine stops
    │   └── EndedElsewhereError                 another rank's doing: it says why
    └── CommunicatorError                       a rank or a link is gone: the engine stops

Every message gives the value, the limit and the way out, in that order.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CheckpointError",
    "CommunicatorError",
    "ConfigError",
    "EndedElsewhereError",
    "ExecutorError",
    "PhalanxError",
    "RequestError",
    "printable",
]


class PhalanxError(Exception):
    """Base of everything that Phalanx raises on purpose."""


class ConfigError(PhalanxError, ValueError):
    """A flag, a layout or this machine does not fit; the operator must change it."""


class CheckpointError(PhalanxError, ValueError):
    """A checkpoint file is missing, broken or not supported."""


class RequestError(PhalanxError, ValueError):
    """One request is invalid; ``param`` names its field, and ``code`` its kind as OpenAI's clients know it, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(PhalanxError):
    """There is no room now; ``retry_after_seconds`` says when to come back."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ExecutorError(PhalanxError):
    """A step could not be computed; the engine cannot go on."""


class EndedElsewhereError(ExecutorError):
    """Another rank ended what all ranks were doing, and is the one to say why."""


class CommunicatorError(PhalanxError):
    """A rank or a link is gone; the engine cannot go on."""


def printable(text: str) -> str:
    """An error's text as UTF-8 can have it: bytes of a file name that are not UTF-8 are written out."""
    return text.encode(errors="backslashreplace").decode()
