# SPDX-License-Identifier: Apache-2.0
"""How fast ``/health`` answers while a server is under load."""

from __future__ import annotations

import http.client
import threading
import time
from urllib.parse import urlsplit

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
        self._address = urlsplit(url)
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
            connection = self._connection()
            started = time.monotonic()
            try:
                connection.request("GET", self._address.path.rstrip("/") + "/health")
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                status = 0
            finally:
                connection.close()
            if status in (401, 403, 404):
                return
            self.seconds.append(time.monotonic() - started)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        return kind(self._address.hostname or "", self._address.port, timeout=LONGEST_SECONDS)
