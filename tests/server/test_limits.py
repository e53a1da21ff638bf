"""Limits: sizes, times, how many at once; and nobody else suffers from a client at a limit."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .servers import Server, stub_server

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def small(model_directory: Path) -> Iterator[Server]:
    """Short times, and room for two requests that take five seconds each."""
    settings = {
        "header_timeout_seconds": 0.3,
        "body_timeout_seconds": 0.3,
        "max_header_bytes": 4096,
        "request_timeout_seconds": 5.0,
    }
    with stub_server(model_directory, settings, max_open_requests=2, step_seconds=0.02) as running:
        yield running


def raw(server: Server, data: bytes) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes the connection."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
        return received


def chunked(chunks: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_a_declared_body_over_the_limit_is_refused_unread(server: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert raw(server, head).startswith(b"HTTP/1.1 413 ")


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    answer = server.post(PATH, {"prompt": "a" * 100_001})
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_chunked_body_is_counted_as_it_comes(server: Server) -> None:
    reply = raw(server, chunked([b" " * 30_000] * 5))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in reply
    assert b"connection: close" in reply.lower()


def test_chunks_that_come_together_are_counted_one_by_one(server: Server) -> None:
    body = [b'{"prompt": "ab", ', b'"max_tokens": 1}']
    for num_chunks, status in ((50, b"200"), (51, b"413")):
        data = chunked([body[0], *[b" "] * (num_chunks - 2), body[1]])
        reply = raw(server, data.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        assert reply.startswith(b"HTTP/1.1 " + status)


def test_a_chunked_body_within_the_limit_is_a_request(server: Server) -> None:
    data = chunked([b'{"prompt": ', b'"ab", "max_', b'tokens": 2}'])
    reply = raw(server, data.replace(b"Host: x", b"Host: x\r\nConnection: close"))
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_come_is_given_up(small: Server) -> None:
    reply = raw(small, b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"pro')
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in reply


@pytest.mark.parametrize("data", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_silent_connection_is_closed(small: Server, data: bytes) -> None:
    assert raw(small, data) == b""


def test_a_kept_alive_connection_is_not_taken_for_a_silent_one(small: Server) -> None:
    connection = small.connect()
    for _ in range(3):
        connection.request("POST", PATH, b'{"prompt": "a", "max_tokens": 20}')
        assert connection.getresponse().read()
    connection.close()


def test_headers_over_the_limit_end_the_connection(small: Server) -> None:
    with contextlib.suppress(ConnectionError):  # the refusal is lost where data still comes after it
        reply = raw(small, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 431 ")
    assert small.get("/health").status == 200


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
        (POST + b"Content-Length: -5\r\n\r\n", 400, "bad Content-Length"),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "conflicting Content-Length headers"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "Only Transfer-Encoding: chunked is supported"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "illegal chunk header"),
    ],
)
def test_no_http_is_refused_with_an_error_object(small: Server, data: bytes, status: int, reason: str) -> None:
    head, _, body = raw(small, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http"
    assert reason in error["message"]
    assert small.get("/health").status == 200


def test_no_http_after_an_answer_closes_the_connection_without_a_traceback(small: Server) -> None:
    address = urlsplit(small.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        answer = connection.recv(65_536)
        while not answer.endswith(b"}}"):
            answer += connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 404 ")
        connection.sendall(b"zz\r\n")
        assert connection.recv(65_536) == b""
    assert small.get("/health").status == 200
    assert not [line for line in small.lines if "Traceback" in line]


@pytest.mark.parametrize("line", ["HEAD /health", "GET /health", "POST /nothing", "POST /v2/models/ensemble/load"])
def test_a_bad_chunk_with_the_head_is_answered_once_and_without_a_traceback(small: Server, line: str) -> None:
    reply = raw(small, f"{line} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode())
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert (b"HTTP/1.1" in body, bool(body)) == (False, not line.startswith("HEAD"))
    assert small.get("/health").status == 200
    assert not [logged for logged in small.lines if "Traceback" in logged]


@pytest.mark.parametrize("target", ["/v2/models/ensemble/infer", "http://x/v2/models/ensemble/infer"])
def test_a_bad_chunk_below_v2_is_refused_in_tritons_form(small: Server, target: str) -> None:
    reply = raw(small, f"POST {target} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode())
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert error.startswith("invalid HTTP request: illegal chunk header")


def test_only_the_beginning_of_a_line_that_is_not_http_is_repeated(small: Server) -> None:
    reply = raw(small, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"y" * 2000 + b"\r\n\r\n")
    message = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert "illegal header line" in message
    assert len(message) < 250


def test_a_full_queue_is_429_and_room_is_made_when_clients_leave(small: Server) -> None:
    body: dict[str, Any] = {"prompt": "ab", "max_tokens": 200}
    streams = [small.open_stream(PATH, body) for _ in range(2)]
    for refused in (small.post(PATH, body), small.post(PATH, {**body, "stream": True})):
        assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "queue_full", "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
    for stream in streams:
        stream.close()
    small.wait_for("CANCELLED", 2)
    assert small.post(PATH, {"prompt": "ab", "max_tokens": 1, "n": 2}).status == 200


def test_more_answers_than_could_ever_fit_are_a_mistake(small: Server) -> None:
    for fields in ({"prompt": "a", "n": 3}, {"prompt": ["a"] * 3}, {"prompt": [[30]] * 2, "n": 2}):
        answer = small.post(PATH, fields)
        assert (answer.status, answer.error["param"]) == (400, "n")


def test_a_refused_request_leaves_no_trace_in_the_count(small: Server) -> None:
    for _ in range(5):
        assert small.post(PATH, {"prompt": "a", "top_p": 7}).status == 400
        assert small.post(PATH, {"prompt": "a" * 999}).status == 400
    assert small.post(PATH, {"prompt": "ab", "max_tokens": 1, "n": 2}).status == 200


def test_a_request_ends_at_its_deadline(model_directory: Path) -> None:
    settings = {"request_timeout_seconds": 0.2}
    with stub_server(model_directory, settings, step_seconds=0.02) as server:
        answer = server.post(PATH, {"prompt": "ab", "max_tokens": 200})
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert answer.headers["x-should-retry"] == "false"
        events = server.stream(PATH, {"prompt": "ab", "max_tokens": 200})
        assert events[-1]["error"]["code"] == "request_timeout"
        assert len(events) > 2
