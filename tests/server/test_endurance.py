"""Many clients, many faults, for long: ``make test-endurance``. Each test prints its figure; docs/serving.md lists them.

Counts, statuses and memory are asserted. Seconds depend on the machine and what else it does: they are printed next to their bounds, and
what takes ten times as long fails, because then something was held up.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import pytest

from phalanx.runtime.server.app import server_routes
from tests.support.hostile_guides import HOSTILE_GUIDES

from .kserve.test_grpc import address as grpc_address
from .kserve.test_grpc import grpcclient, text_inputs
from .load import Load, measure
from .servers import ROOT, Server, stub_server
from .test_fuzz import VALID
from .test_routes import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PATH = "/v1/completions"
ENSEMBLE = "/v2/models/ensemble"
SOAK_SECONDS = float(os.environ.get("PHALANX_SOAK_SECONDS", "600"))


def within(measured: float, bound: float, unit: str = "s") -> str:
    """A figure next to its bound, of which it may be ten times as much, or 5 s where that is more."""
    assert measured <= max(10 * bound, {"s": 5, "ms": 5_000}[unit]), (
        f"{measured:.2f} {unit}; the bound is {bound:g} {unit}"
    )
    return f"{measured:.2f} {unit} ({'within' if measured <= bound else 'OVER'} the bound of {bound:g} {unit})"


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
        print(f"figure 9: the next request took {within(seconds, 5)}, idle after {wait_until_idle(server):.2f} s")


def test_1000_clients_that_leave_at_random_moments(model_directory: Path) -> None:
    """Figure 10: streams, whole answers, Triton's over HTTP and gRPC; afterwards nothing is open, and an end is noticed at once."""
    options = {"max_open_requests": 256, "step_seconds": 0.005}
    draw = random.Random(10)
    with (
        stub_server(model_directory, {"grpc_port": 0}, **options) as server,
        ThreadPoolExecutor(32) as threads,
        grpcclient.InferenceServerClient(grpc_address(server)) as client,
    ):

        def one(number: int) -> None:
            seconds = 0.001 + delays[number]
            body = {"prompt": "ab", "max_tokens": 200, "stream": number % 4 == 0}
            if number % 4 == 2:
                path, body = f"{ENSEMBLE}/generate_stream", {"text_input": "ab", "max_tokens": 200, "stream": True}
                leave_after(server, body, seconds, path)
            elif number % 4 == 3:
                with contextlib.suppress(grpcclient.InferenceServerException):
                    client.infer("ensemble", text_inputs("ab", 200), client_timeout=seconds)
            else:
                leave_after(server, body, seconds)

        delays = [draw.random() * 0.5 for _ in range(1000)]
        list(threads.map(one, range(1000)))
        print(f"figure 10: idle after {wait_until_idle(server):.2f} s")
        waits = sorted(seconds_to_cancel(server) for _ in range(100))
        p99 = within(1e3 * waits[-2], 50, "ms")
        print(f"figure 10: the engine is told after {1e3 * median(waits):.1f} ms, p99 {p99}")
        assert server.post(PATH, {"prompt": "a", "max_tokens": 1}).status == 200


def seconds_to_cancel(server: Server) -> float:
    """From the end of a stream's connection to the engine's word that its request is cancelled."""
    before = len([line for line in server.lines if line.startswith("CANCELLED")])
    stream = server.open_stream(PATH, {"prompt": "ab", "max_tokens": 200})
    start = time.monotonic()
    stream.close()
    server.wait_for("CANCELLED", before + 1)
    return time.monotonic() - start


def gaps(server: Server, num_tokens: int) -> list[float]:
    """Seconds between the events of a stream, which must say all its tokens, from the shortest to the longest."""
    options = {"include_usage": True}
    stream = server.open_stream(PATH, {"prompt": "ab", "max_tokens": num_tokens, "stream_options": options})
    times, events = [], []
    for line in stream:
        if line.startswith(b"data: "):
            times.append(time.monotonic())
            events.append(line.removeprefix(b"data: "))
    assert json.loads(events[-2])["usage"]["completion_tokens"] == num_tokens
    return sorted(after - before for before, after in pairwise(times))


def test_100_readers_that_never_read(model_directory: Path) -> None:
    """Figure 11: memory of the HTTP process grows by less than 64 MB, and another stream goes on as before."""
    options = {"max_open_requests": 128, "max_model_len": 20_100, "step_seconds": 0.01}
    with stub_server(model_directory, {}, **options) as server:
        alone = gaps(server, 1000)
        before = resident_bytes(server.http_process())
        body = json.dumps({"prompt": "ab", "max_tokens": 20_000, "stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with contextlib.ExitStack() as readers:
            for _ in range(100):
                client = readers.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(address(server))
                client.sendall(head + body)
            among = gaps(server, 1000)
            grown = resident_bytes(server.http_process()) - before
        p99 = [times[-1 - len(times) // 100] for times in (alone, among)]
        print(
            f"figure 11: {grown / 1e6:.0f} MB more with 100 readers that do not read; p99 gap of another stream {1e3 * p99[0]:.1f} ms "
            f"alone, {within(1e3 * p99[1], 1.2e3 * p99[0], 'ms')} among them, in {len(among)} events of 1,000 tokens"
        )
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
        print(f"figure 14: 50 refused, the slowest after {within(1e3 * max(refused), 100, 'ms')}")
        assert server.post(PATH, {"prompt": "a", "max_tokens": 1}).status == 200


@pytest.mark.parametrize("step_seconds", [0.0, 0.06])
def test_1024_streams(step_seconds: float) -> None:
    """Figure 15: no error; how many events a second, and when the first token comes. Paced by steps, and as fast as they go."""
    report, used = measure(Load(streams=1024, step_seconds=step_seconds))
    first = report["time_to_first_token_ms"]
    print(
        f"figure 15: 1,024 streams, {'paced' if step_seconds else 'unpaced'}: {report['output_tokens_per_second']:,.0f} tokens/s, "
        f"{report['output_tokens_per_event']:.1f} an event, {1e6 * used[1] / report['output_tokens']:.1f} us of processor each, first token "
        f"p99 {within(first['p99'], 1000, 'ms')}"
    )
    assert (report["failed_requests"], report["errors"]) == (0, [])


def test_hostile_guides_hold_up_no_other_request() -> None:
    """Figure 25: each is refused or compiled within 5 s; /health answers meanwhile."""
    with stub_server(ROOT / "checkpoints" / "demo", {}, vocab_size=6144) as server, ThreadPoolExecutor(2) as threads:
        seconds, waits = [], []
        for name, guide in HOSTILE_GUIDES.items():
            if name == "deeper":  # than a request may be, and Python's encoder can go
                continue
            asked = time.monotonic()
            answer = threads.submit(server.post, PATH, {"prompt": "a", "max_tokens": 1, "structured_outputs": guide})
            while not answer.done():
                start = time.monotonic()
                assert server.get("/health").status == 200
                waits.append(time.monotonic() - start)
            seconds.append(time.monotonic() - asked)
            assert answer.result().status in (200, 400)
        resident = resident_bytes(server.http_process())
    print(
        f"figure 25: {len(seconds)} guides, the slowest {within(max(seconds), 5)}; /health p50 {1e3 * median(waits):.1f} ms, "
        f"longest {within(1e3 * max(waits), 50, 'ms')}; {resident / 1e6:.0f} MB"
    )


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


def test_sizes_at_the_limits_and_beyond(model_directory: Path) -> None:
    """Figure 19: what is too large is refused by its limit, what just fits is read, and an endless header takes no memory."""
    with stub_server(model_directory, {}) as server:
        pid, ensemble = server.http_process(), f"{ENSEMBLE}/generate"
        assert server.post(PATH, {"prompt": "a", "max_tokens": 1}).status == 200
        before = resident_bytes(pid)
        grown = max(resident_bytes(pid) for _ in endless_header(server)) - before
        fits = b'{"prompt": "' + b"a" * ((64 << 20) - 14) + b'"}'
        assert server.post(PATH, fits).error["code"] == "context_length_exceeded"
        assert server.post(PATH, fits + b" ").status == 413
        chunks = [b"1\r\n \r\n"] * 65_535 + [b"2\r\n{}\r\n"]
        assert answered(server, chunked_head(PATH) + b"".join(chunks) + b"0\r\n\r\n") == 400
        assert answered(server, chunked_head(PATH) + b"".join([chunks[0], *chunks]) + b"0\r\n\r\n") == 413
        bomb = gzip.compress(bytes((64 << 20) + 1), 9)
        answers = {path: server.post(path, bomb, **{"Content-Encoding": "gzip"}).status for path in (PATH, ensemble)}
        assert answers == {PATH: 413, ensemble: 400}
        for depth in (101, 250_000):
            nested = b'{"prompt": "a", "text_input": "a", "user": ' + b"[" * depth + b"]" * depth + b"}"
            assert [server.post(path, nested).status for path in (PATH, ensemble)] == [400, 400]
    print(f"figure 19: {grown / 1e6:.1f} MB more while a header of 200 MB is sent")
    assert grown < 16e6


def chunked_head(path: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def answered(server: Server, request: bytes) -> int:
    with socket.create_connection(address(server), timeout=60) as client:
        client.sendall(request)
        return int(client.recv(4096)[9:12])


def endless_header(server: Server) -> Iterator[int]:
    """Send a header of 200 MB; yields after each part until the server has closed the connection."""
    with contextlib.suppress(ConnectionError), socket.create_connection(address(server), timeout=60) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        for sent in range(0, 200_000_000, 1 << 16):
            client.sendall(b"a" * (1 << 16))
            yield sent
        pytest.fail("a header of 200 MB was read")
    yield 0


def test_300_clients_that_send_a_byte_now_and_then(model_directory: Path) -> None:
    """Figure 19: they are closed after the limit on headers and bodies; /health answers meanwhile."""
    with stub_server(model_directory, {}) as server, contextlib.ExitStack() as opened:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n".encode()
        body = head + b"Content-Length: 1000\r\n\r\n"
        clients = [opened.enter_context(socket.create_connection(address(server))) for _ in range(300)]
        for number, client in enumerate(clients):
            client.sendall(body if number % 2 else head + b"X: ")
        start, waits = time.monotonic(), []
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(0.5):
                    client = key.fileobj
                    assert isinstance(client, socket.socket)
                    with contextlib.suppress(ConnectionError):
                        if client.recv(4096):
                            continue
                    selector.unregister(client)
                for key in selector.get_map().values():
                    with contextlib.suppress(OSError):
                        assert isinstance(key.fileobj, socket.socket)
                        key.fileobj.send(b" ")
                asked = time.monotonic()
                assert server.get("/health").status == 200
                waits.append(time.monotonic() - asked)
        seconds = time.monotonic() - start
    print(
        f"figure 19: closed after {within(seconds, 31)}; /health p50 {within(1e3 * median(waits), 50, 'ms')}, max {1e3 * max(waits):.0f} ms"
    )


MUTATIONS = int(os.environ.get("PHALANX_MUTATIONS", "200"))
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE")


def test_mutated_requests_on_every_route_and_method(model_directory: Path) -> None:
    """Figure 22: bytes of requests changed, removed, repeated; the server answers below 500 or closes, and lives."""
    paths = sorted({re.sub(r"\{model.*?\}", "ensemble", route.path) for route in server_routes(None, None)})  # type: ignore[arg-type]
    cases = [(path, method, seed) for path in paths for method in METHODS for seed in range(MUTATIONS)]
    settings = {"header_timeout_seconds": 0.5, "body_timeout_seconds": 0.5, "model_names": ["ensemble"]}
    with stub_server(model_directory, settings, max_open_requests=64) as server, ThreadPoolExecutor(16) as threads:
        statuses = Counter(threads.map(lambda case: mutated(server, *case), cases))
        assert server.get("/health").status == 200
        assert server.process.poll() is None
        wait_until_idle(server)
    print(f"figure 22: {len(cases)} requests on {len(paths)} routes: {dict(sorted(statuses.items()))}")
    assert not [status for status in statuses if status >= 500 and status != 501]
    _, said = server.wait()
    assert "Traceback" not in said


def mutated(server: Server, path: str, method: str, seed: int) -> int:
    """The status of a request with a few changes; 0 = the server closed the connection without one."""
    draw = random.Random(f"{path} {method} {seed}")
    body = json.dumps(VALID.get(path, {"text_input": "ab", "max_tokens": 2})).encode()
    request = bytearray(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    for _ in range(draw.randrange(1, 8)):
        position, length = draw.randrange(len(request)), draw.randrange(4)
        kept = request[position : position + length] * draw.choice((0, 0, 2, 300))
        request[position : position + length] = kept or draw.randbytes(draw.randrange(4))
    with contextlib.suppress(ConnectionError), socket.create_connection(address(server), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while (received := connection.recv(65_536)).startswith(b"HTTP/1.1 100"):  # asks whether the client is there
            continue
        return int(received[9:12]) if received else 0
    return 0


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
