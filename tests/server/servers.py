"""Starts stub servers as real processes and talks to them with the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
EXIT_SECONDS = 30


class Server:
    """A server process and what it has written to standard error, read all the time so that it never waits for us."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: list[str] = []
        self.connections: list[http.client.HTTPConnection] = []
        self.streams: list[http.client.HTTPResponse] = []
        self._closed = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, word: str, count: int = 1) -> str:
        """Wait for ``count`` lines that start with ``word``; the last of them."""
        with self._news:
            self._news.wait_for(lambda: len(self._find(word)) >= count or self._closed, EXIT_SECONDS)
        found = self._find(word)
        assert len(found) >= count, f"{len(found)} x {word} in {''.join(self.lines)!r}"
        if " http" in found[-1]:
            self.url = found[-1].split()[1]
        return found[-1]

    def lines_with(self, text: str) -> list[str]:
        """Lines so far that contain ``text``, after waiting for the first of them."""
        with self._news:
            self._news.wait_for(lambda: any(text in line for line in self.lines) or self._closed, EXIT_SECONDS)
        return [line for line in self.lines if text in line]

    def wait(self) -> tuple[int, str]:
        """Exit status and all of standard error."""
        status = self.process.wait(EXIT_SECONDS)
        self._reader.join(EXIT_SECONDS)
        return status, "".join(self.lines)

    def _find(self, word: str) -> list[str]:
        return [line for line in self.lines if line.startswith(word)]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    def drain(self) -> tuple[int, str]:
        """Ask it to leave and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own, closed at the latest with the server."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        self.connections.append(connection)
        return connection

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

    def open_stream(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """A stream of which the first event has arrived; close it to leave."""
        return self.begin_stream(path, body)[0]

    def begin_stream(self, path: str, body: dict[str, Any]) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
        """The same, and the first event."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Connection": "close"})
        response = connection.getresponse()
        assert response.status == 200
        line = response.readline()
        assert line.startswith(b"data: ")
        self.streams.append(response)
        return response, json.loads(line.removeprefix(b"data: "))

    def http_process(self) -> int:
        """Process id of the HTTP process, the only child of a stub server."""
        (process,) = self.http_processes()
        return process

    def http_processes(self) -> list[int]:
        """Process ids of all HTTP processes, in their order."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

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
def start(command: list[str], **environment: str) -> Iterator[Server]:
    """Run ``command`` in the checkout; kill it at the end if it still runs."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process)
    try:
        yield server
    finally:
        for item in (*server.streams, *server.connections):
            item.close()
        if process.poll() is None:
            process.kill()
        server.wait()
        assert process.stderr is not None
        process.stderr.close()
