# SPDX-License-Identifier: Apache-2.0
"""One thing that was looked at, and how a probe becomes one without ever raising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from phalanx.parallel.errors import PhalanxError

__all__ = ["Check", "Status", "attempt"]

Status = Literal["ok", "warn", "off", "fail"]
"""``warn``: works, but not well; ``off``: optional, and not here; ``fail``: should work here and does not."""


@dataclass(frozen=True, slots=True)
class Check:
    """A result in one line; ``fix`` says what to do and is empty when there is nothing to."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def attempt(name: str, probe: Callable[[], str | Check], otherwise: Status = "fail", fix: str = "") -> Check:
    """The check that ``probe`` returns, or ``ok`` with its text; ``otherwise`` when it raises anything.

    Phalanx's own errors say the way out after a semicolon, which becomes the fix.
    """
    try:
        result = probe()
    except PhalanxError as error:
        detail, _, way_out = " ".join(str(error).split()).partition("; ")
        return Check(name, otherwise, detail, way_out or fix)
    except Exception as error:  # a missing or broken library raises whatever it likes
        return Check(name, otherwise, " ".join(f"{type(error).__name__}: {error}".split()), fix)
    return result if isinstance(result, Check) else Check(name, "ok", result)
