# SPDX-License-Identifier: Apache-2.0
"""How far a piece of work is, on standard error: a bar on a terminal, otherwise a plain line every 10 % or 10 seconds.

Under mpirun rank 0's standard error is a pipe, so what people see there are the lines. Work that ends within `QUIET_SECONDS` says
nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from phalanx.runtime.logs import fields, is_json

__all__ = ["Progress"]

_LOG = logging.getLogger("phalanx.progress")
QUIET_SECONDS = 5.0
LINE_SECONDS = 10.0
LINE_FRACTION = 0.1


class Progress:
    """A piece of work with a known or unknown total, used as a context manager.

    Args:
        what: the work, such as ``loading``.
        total: in ``unit``; None = not known yet.
        shown: whether this process may write at all; other ranks, and ``--log-level warning``, may not.
        stream, clock: standard error and seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit, self._shown, self._clock = what, total, unit, shown, clock
        self._stream = sys.stderr if stream is None else stream
        self._done = 0
        self._bar: Any = None
        self._started = clock()
        self._last_line, self._last_done = self._started, 0

    def __enter__(self) -> Progress:
        if self._shown and _LOG.isEnabledFor(logging.INFO) and self._stream.isatty() and not is_json():
            self._bar, self._task = _rich_bar(self._stream, self._what, self._total, self._unit)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.show(self._done + count, self._total, self._what)

    def show(self, done: int, total: int | None, what: str) -> None:
        """``done`` of ``total`` are done, in the part of the work that ``what`` names."""
        self._done, self._total = done, total
        if what != self._what:
            self._what, self._last_done = what, 0
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=what)
        elif self._shown and self._is_due():
            self._last_line, self._last_done = self._clock(), done
            _LOG.info(self._line(), extra=fields(work=self._what, done=done, total=total, unit=self._unit))

    def _is_due(self) -> bool:
        now = self._clock()
        if now - self._started < QUIET_SECONDS:
            return False
        tenth = self._total is not None and self._done - self._last_done >= LINE_FRACTION * self._total
        return tenth or now - self._last_line >= LINE_SECONDS

    def _line(self) -> str:
        seconds = self._clock() - self._started
        if self._total is None and not self._done:
            return f"{self._what}, {seconds:.0f} s"
        amount = f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"
        percent = f" ({100 * self._done // self._total} %)" if self._total else ""
        return f"{self._what}: {amount} {self._unit}{percent}, {seconds:.0f} s"


def _rich_bar(stream: TextIO, what: str, total: int | None, unit: str) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    )  # fmt: skip
    bar = Bar(*columns, console=Console(file=stream), transient=True)
    return bar, bar.add_task(what, total=total)
