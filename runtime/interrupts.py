# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C between two steps instead of inside one, so that an interrupted engine can be used again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """Within the context, a Ctrl-C that comes inside `hold` raises KeyboardInterrupt when the block ends; a second one does not wait.

    Takes over SIGINT only from Python's own handler and only in the main thread; anywhere else it changes nothing.
    """

    def __init__(self) -> None:
        self._is_holding = False
        self._came = False
        self._installed = False

    def __enter__(self) -> HeldInterrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the block run to its end before an interrupt is raised."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
        self.raise_held()

    def raise_held(self) -> None:
        """Raise the interrupt that came meanwhile, if one did."""
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_holding and not self._came:
            self._came = True
        else:
            raise KeyboardInterrupt
