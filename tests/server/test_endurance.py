"""Many clients, many faults, for long: ``make test-endurance``. Each test prints its figure; docs/serving.md lists them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .servers import Server, stub_server
from .test_routes import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PATH = "/v1/completions"
ENSEMBLE = "/v2/models/ensemble"
SOAK_SECONDS = float(os.environ.get("PHALANX_SOAK_SECONDS", "600"))


def address(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def wait_until_idle(server: Server) -> float:
    """Seconds until no request is open."""
    start = time.monotonic()
    while metrics(server)["phalanx_requests_running"] or sum(open_requests(server)):
        assert time.monotonic() - start < 60
    return time.monotonic() - start


def open_requests(server: Server) -> list[float]:
    return [value for name, value in metrics(server).items() if name.startswith("phalanx_http_requests_open")]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def leave_after(server: Server, body: dict[str, Any], seconds: float, path: str = PATH) -> None:
    """Ask, and go away after a while, whatever has come."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with contextlib.suppress(OSError), socket.create_connection(address(server), timeout=seconds) as client:
        client.sendall(head + data)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            client.settimeout(left)
            if not client.recv(65_536):
                return


def test_200_long_requests_whose_clients_give_up(model_directory: Path) -> None:
    """Figure 9: 10,000 tokens each, a client's timeout of 0.5 s; then a request is answered within 5 s and nothing is left."""
    options = {"max_open_requests": 256, "max_model_len": 10_100, "step_seconds": 0.02}
    with stub_server(model_directory, {}, **options) as server, ThreadPoolExecutor(64) as threads:
        bodies = [{"prompt": "ab", "max_tokens": 10_000, "stream": number % 2 == 0} for number in range(200)]
        list(threads.map(lambda body: leave_after(server, body, 0.5), bodies))
        start = time.monotonic()
        assert server.post(PATH, {"prompt": "a", "max_tokens": 10}).status == 200
        seconds = time.monotonic() - start
        print(f"figure 9: the next request took {seconds:.2f} s, idle after {wait_until_idle(server):.2f} s")
        assert seconds < 5


def test_1000_clients_that_leave_at_random_moments(model_directory: Path) -> None:
    """Figure 10: streams, whole answers and Triton's; afterwards nothing is open."""
    options = {"max_open_requests": 256, "step_seconds": 0.005}
    draw = random.Random(10)
    with stub_server(model_directory, {}, **options) as server, ThreadPoolExecutor(32) as threads:

        def one(number: int) -> None:
            body = {"prompt": "ab", "max_tokens": 200, "stream": number % 3 == 0}
            path = PATH
            if number % 3 == 2:
                path, body = f"{ENSEMBLE}/generate_stream", {"text_input": "ab", "max_tokens": 200, "stream": True}
            leave_after(server, body, 0.001 + delays[number], path)

        delays = [draw.random() * 0.5 for _ in range(1000)]
        list(threads.map(one, range(1000)))
        print(f"figure 10: idle after {wait_until_idle(server):.2f} s")
        assert server.post(PATH, {"prompt": "a", "max_tokens": 1}).status == 200


def test_100_readers_that_never_read(model_directory: Path) -> None:
    """Figure 11: memory of the HTTP process grows by less than 64 MB, and another stream goes on."""
    options = {"max_open_requests": 128, "max_model_len": 20_100, "step_seconds": 0.002}
    with stub_server(model_directory, {}, **options) as server:
        before = resident_bytes(server.http_process())
        body = json.dumps({"prompt": "ab", "max_tokens": 20_000, "stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with contextlib.ExitStack() as readers:
            for _ in range(100):
                client = readers.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(address(server))
                client.sendall(head + body)
            events = server.stream(PATH, {"prompt": "ab", "max_tokens": 2000})
            grown = resident_bytes(server.http_process()) - before
        print(f"figure 11: {grown / 1e6:.0f} MB more with 100 readers that do not read")
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert grown < 64e6
        wait_until_idle(server)


def test_requests_over_the_limit_are_refused_exactly_and_at_once(model_directory: Path) -> None:
    """Figure 14: of the limit and 50 more, 50 get 429, and all others an answer."""
    with stub_server(model_directory, {}, max_open_requests=64, step_seconds=0.02) as server:
        with ThreadPoolExecutor(114) as threads:

            def one(_: int) -> tuple[int, float]:
                start = time.monotonic()
                status = server.post(PATH, {"prompt": "ab", "max_tokens": 200}).status
                return status, time.monotonic() - start

            answers = list(threads.map(one, range(114)))
        refused = [seconds for status, seconds in answers if status == 429]
        assert len(refused) == 50
        assert sum(status == 200 for status, _ in answers) == 64
        print(f"figure 14: 50 refused, the slowest after {1e3 * max(refused):.0f} ms")
        assert server.post(PATH, {"prompt": "a", "max_tokens": 1}).status == 200


def test_100_threads_over_three_routes_of_triton(model_directory: Path) -> None:
    """Figure 16: 50 + 50 threads, generate, generate_stream and infer, 20 rounds, no failure."""
    fields = {"text_input": "ab", "max_tokens": 4, "stream": True}
    infer = {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["ab"]},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [4]},
        ]
    }
    with stub_server(model_directory, {}, max_open_requests=128) as server, ThreadPoolExecutor(100) as threads:

        def one(number: int) -> int:
            if number % 2:
                return server.post(f"{ENSEMBLE}/infer", infer).status
            route = "generate_stream" if number % 4 else "generate"
            return server.post(f"{ENSEMBLE}/{route}", fields).status

        for _ in range(20):
            assert set(threads.map(one, range(100))) == {200}
        print("figure 16: 2,000 requests, no failure")


def test_mixed_load_with_clients_that_crash(model_directory: Path) -> None:
    """Figure 17: memory and descriptors of the HTTP process after the first tenth are those at the end."""
    draw = random.Random(17)
    with stub_server(model_directory, {}, max_open_requests=64, step_seconds=0.002) as server:
        pid, end, num_requests = server.http_process(), time.monotonic() + SOAK_SECONDS, 0

        def one(kind: float) -> None:
            body = {"prompt": "ab" * int(1 + 20 * kind), "max_tokens": 60, "stream": kind < 0.7}
            if kind < 0.4:
                leave_after(server, body, kind / 8)
            elif kind < 0.5:
                server.post(PATH, {**body, "top_p": 7})
            else:
                server.post(PATH, body)

        samples: list[tuple[int, int]] = []
        with ThreadPoolExecutor(24) as threads:
            while time.monotonic() < end:
                list(threads.map(one, [draw.random() for _ in range(240)]))
                num_requests += 240
                wait_until_idle(server)
                samples.append((resident_bytes(pid), num_descriptors(pid)))
        first, last = samples[len(samples) // 10], samples[-1]
        print(
            f"figure 17: {SOAK_SECONDS:.0f} s, {num_requests} requests; from {first[0] / 1e6:.1f} to {last[0] / 1e6:.1f} MB, "
            f"{first[1]} to {last[1]} descriptors"
        )
        assert last[0] - first[0] < 10e6
        assert abs(last[1] - first[1]) <= 2
