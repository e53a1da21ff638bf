"""Start, drain, failure: clients always learn what happened, and neither process outlives the other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .servers import Server, stub_server

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "ab", "max_tokens": 200}


def events(stream: Any) -> list[Any]:
    """What is left of a stream after its first event; its end must be ``[DONE]``."""
    lines = [line for line in stream.read().decode().split("\n\n") if line.strip()]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.strip().removeprefix("data: ")) for line in lines[:-1]]


def wait_until_refused(server: Server) -> None:
    """Until nobody listens on the port any more; the test's timeout is the limit."""
    address = urlsplit(server.url)
    with contextlib.suppress(OSError):
        while True:
            socket.create_connection((address.hostname, address.port), timeout=5).close()


def test_every_route_says_503_while_the_engine_starts(model_directory: Path) -> None:
    with stub_server(model_directory, {}, wait_for="BOUND", start_seconds=1.5) as server:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/nothing"):
            answer = server.get(path)
            assert (answer.status, answer.error["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1"
        assert server.post(PATH, {"prompt": "a"}).status == 503
        server.wait_for("READY")
        assert server.get("/health").status == 200
        assert server.post(PATH, {"prompt": "a"}).status == 200


def test_drain_answers_what_is_open_and_refuses_what_is_new(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01) as server:
        stream = server.open_stream(PATH, LONG)
        server.process.send_signal(signal.SIGTERM)
        while (refused := server.get("/ready")).status == 200:
            continue
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert server.post(PATH, LONG).status == 503
        assert server.get("/health").status == 200
        assert server.get("/metrics").status == 200
        rest = events(stream)
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait()[0] == 0
        wait_until_refused(server)


def test_drain_without_work_ends_at_once(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        status, errors = server.drain()
    assert status == 0
    assert "Traceback" not in errors


def test_a_drain_does_not_wait_for_idle_connections(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        connection = server.connect()
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        assert server.drain()[0] == 0
        connection.close()


def test_when_the_engine_fails_every_client_is_told_and_the_server_ends(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01, fail_after_steps=20) as server:
        streams = [server.open_stream(PATH, LONG) for _ in range(2)]
        answer = server.post(PATH, LONG)
        assert (answer.status, answer.error["code"]) == (500, "engine_failed")
        assert "the stub broke" in answer.error["message"]
        for stream in streams:
            assert events(stream)[-1]["error"]["code"] == "engine_failed"
        status, errors = server.wait()
        assert status == 1
        assert "the stub broke" in errors
        wait_until_refused(server)


def test_when_the_engine_process_is_killed_clients_are_told_and_the_port_closes(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01) as server:
        stream = server.open_stream(PATH, LONG)
        server.process.kill()
        last = events(stream)[-1]
        assert last["error"]["code"] == "engine_failed"
        assert last["error"]["type"] == "server_error"
        server.wait()
        wait_until_refused(server)


def test_when_the_http_process_is_killed_the_engine_ends_with_a_message(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        os.kill(server.http_process(), signal.SIGKILL)
        status, errors = server.wait()
    assert status == 1
    assert re.search(r"HTTP process 0 \(pid \d+\) is gone", errors)


def test_a_stopped_http_process_does_not_outlive_the_engine(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        pid = server.http_process()
        os.kill(pid, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        try:
            deadline = time.monotonic() + 30
            while b"http_process" in command_line(pid):
                assert time.monotonic() < deadline, f"process {pid} is still there"
        finally:
            if command_line(pid):
                os.kill(pid, signal.SIGKILL)


def command_line(pid: int) -> bytes:
    """Of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_signals_to_the_http_process_do_nothing(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCONT):
            os.kill(server.http_process(), number)
        assert server.post(PATH, {"prompt": "a"}).status == 200
        assert server.drain()[0] == 0


def test_health_fails_while_no_step_finishes(model_directory: Path) -> None:
    with stub_server(model_directory, {"stall_seconds": 0.5}, hang_after_steps=3) as server:
        assert server.get("/health").status == 200
        stream = server.open_stream(PATH, LONG)
        while (answer := server.get("/health")).status == 200:
            continue
        assert (answer.status, answer.error["code"]) == (503, "engine_stalled")
        stream.close()


def test_a_port_in_use_is_said_in_one_line(model_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with stub_server(model_directory, {"port": port}, wait_for="") as server:
            status, errors = server.wait()
    assert status == 2
    assert errors == (
        f"--port {port} on 127.0.0.1 cannot be opened: Address already in use; "
        "choose another with --port, or 0 for any free one\n"
    )


def test_a_broken_tokenizer_ends_the_server_with_its_file(model_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(model_directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with stub_server(tmp_path, {}, wait_for="") as server:
        status, errors = server.wait()
    assert status == 1
    assert "tokenizer.json cannot be read" in errors


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_client_that_leaves_ends_its_requests(model_directory: Path, stream: bool, num_prompts: int) -> None:
    body = {"prompt": ["ab"] * num_prompts, "max_tokens": 250, "stream": stream}
    with stub_server(model_directory, {}, step_seconds=0.02) as server:
        connection = server.connect()
        connection.request("POST", PATH, json.dumps(body))
        while server.get("/metrics").body.find(f"phalanx_requests_running {num_prompts}.0".encode()) < 0:
            continue
        connection.close()
        server.wait_for("CANCELLED", num_prompts)
        while server.get("/metrics").body.find(b"phalanx_requests_running 0.0") < 0:
            continue


def test_a_client_that_leaves_before_the_first_token_ends_its_request(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.5) as server:
        connection = server.connect()
        connection.request("POST", PATH, json.dumps({**LONG, "stream": True}))
        while server.get("/metrics").body.find(b"phalanx_prompt_tokens_total 2.0") < 0:
            continue
        connection.close()
        server.wait_for("CANCELLED")


def test_many_clients_that_leave_at_any_moment_leave_nothing_behind(model_directory: Path) -> None:
    with stub_server(model_directory, {}, max_open_requests=64, step_seconds=0.002) as server:
        for round_ in range(40):
            connections = [server.connect() for _ in range(4)]
            for number, connection in enumerate(connections):
                connection.request("POST", PATH, json.dumps({**LONG, "n": 1 + number, "stream": number % 2 == 0}))
            if round_ % 2:
                connections[0].getresponse().readline()
            for connection in connections:
                connection.close()
        # Until the last connections are noticed to be closed the room is taken; the test's timeout is the limit.
        while (answer := server.post(PATH, {"prompt": "a", "n": 64, "max_tokens": 1})).status == 429:
            continue
        assert answer.status == 200
