"""Starts stub servers as real processes and talks to them with the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
EXIT_SECONDS = 30


class Server:
    """A server process. Its standard error is read only as far as a test needs it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: list[str] = []

    def wait_for(self, word: str) -> str:
        """Read standard error up to a line that starts with ``word``; the rest of that line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith(word):
                self.url = line.split()[1]
                return line[len(word) :].strip()
        raise AssertionError(f"no {word} in {''.join(self.lines)!r}")

    def wait(self) -> tuple[int, str]:
        """Exit status and all of standard error."""
        assert self.process.stderr is not None
        self.lines += self.process.stderr.readlines()
        return self.process.wait(EXIT_SECONDS), "".join(self.lines)

    def drain(self) -> tuple[int, str]:
        """Ask it to leave and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        return http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own; ``body`` is sent as JSON unless it is bytes."""
        connection = self.connect()
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def get(self, path: str, **headers: str) -> Answer:
        """``GET``."""
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """``POST``."""
        return self.request("POST", path, body, headers)

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All events of a stream, which must end with ``[DONE]``."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = answer.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: ") for event in events[:-1])
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


class Answer:
    """A whole response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have exactly its four members."""
        error: dict[str, Any] = self.json["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        return error


@contextlib.contextmanager
def stub_server(directory: Path, settings: dict[str, Any], wait_for: str = "READY", **options: Any) -> Iterator[Server]:
    """A stub server in front of the tokenizer in ``directory``; killed at the end if it still runs."""
    arguments = [json.dumps({"port": 0, **settings}), json.dumps({"directory": str(directory), **options})]
    command = [sys.executable, "-m", "tests.server.stub_server", *arguments]
    with start(command) as server:
        if wait_for:
            server.wait_for(wait_for)
        yield server


@contextlib.contextmanager
def start(command: list[str]) -> Iterator[Server]:
    """Run ``command`` in the checkout; kill it at the end if it still runs."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
