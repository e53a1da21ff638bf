# SPDX-License-Identifier: Apache-2.0
"""How fast ``/health`` answers while a server is under load."""

from __future__ import annotations

import threading
import time

import httpx

__all__ = ["HealthProbe"]

INTERVAL_SECONDS = 0.2
LONGEST_SECONDS = 30.0


class HealthProbe:
    """Asks again and again, each time over a new connection as a supervisor does, from a thread between `start` and `stop`.

    Attributes:
        seconds: how long each answer took; empty where the server has no such route.
    """

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url = url.rstrip("/") + "/health"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="health", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> list[float]:
        """End, and return what was measured."""
        self._is_over.set()
        self._thread.join()
        return self.seconds

    def _ask(self) -> None:
        while not self._is_over.wait(INTERVAL_SECONDS):
            started = time.monotonic()
            try:
                status = httpx.get(self._url, timeout=LONGEST_SECONDS, trust_env=False).status_code
            except httpx.HTTPError:
                status = 0
            if status in (401, 403, 404):
                return
            self.seconds.append(time.monotonic() - started)
