"""Between client and server: what proxies, browsers, odd clients and clients that stop reading meet."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.server.settings import FrontendSettings

from .servers import Server, stub_server

PATH = "/v1/completions"


def connected(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=20)


def raw(path: str, body: dict[str, Any], version: str = "1.1", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def received(client: socket.socket, until: bytes = b"") -> bytes:
    data = b""
    while part := client.recv(65_536):
        data += part
        if until and until in data:
            break
    return data


# Clients that have sent everything


@pytest.mark.parametrize(
    ("body", "until"), [({"max_tokens": 3}, b"usage"), ({"max_tokens": 200, "stream": True}, b"[DONE]")]
)
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_client_that_closes_its_sending_side_gets_its_answer(
    model_directory: Path, body: dict[str, Any], until: bytes, seconds: float
) -> None:
    with stub_server(model_directory, {}, step_seconds=seconds or 0.001) as server, connected(server) as client:
        client.sendall(raw(PATH, {"prompt": "ab", **body, "max_tokens": 3}))
        client.shutdown(socket.SHUT_WR)
        data = received(client, until)
        assert b" 200 OK" in data
        assert until in data


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_noticed_before_the_first_token_too(model_directory: Path, stream: bool) -> None:
    with stub_server(model_directory, {}, step_seconds=0.1) as server:
        with connected(server) as client:
            client.sendall(raw(PATH, {"prompt": "ab", "max_tokens": 200, "stream": stream}))
        server.wait_for("CANCELLED")


# Targets and bodies


@pytest.mark.parametrize(
    "target", [f"http://other:1{PATH}", f"http://x{PATH}?a=b", f"HTTP://x{PATH}", f"https://x{PATH}"]
)
def test_a_target_in_absolute_form_names_its_path(server: Server, target: str) -> None:
    with connected(server) as client:
        client.sendall(raw(target, {"prompt": "ab", "max_tokens": 1}, headers="Connection: close\r\n"))
        assert received(client).startswith(b"HTTP/1.1 200 ")


BODY = json.dumps({"prompt": "ab", "max_tokens": 1}).encode()


def gzipped(data: bytes) -> bytes:
    """Compressed without the time of day, so that a test has the same name in every test process."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [("gzip", gzipped(BODY)), ("x-gzip", gzipped(BODY)), ("GZIP", gzipped(BODY)), ("deflate", zlib.compress(BODY)),
     ("identity", BODY)],
)  # fmt: skip
def test_compressed_bodies_are_read(server: Server, encoding: str, data: bytes) -> None:
    assert server.post(PATH, data, **{"Content-Encoding": encoding}).status == 200


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [("gzip", BODY, 400), ("gzip", gzipped(BODY)[:-9], 400), ("gzip", gzipped(BODY) + b"x", 400), ("br", BODY, 415),
     ("gzip, gzip", BODY, 415), ("deflate", gzipped(b" " * 200_000), 413), ("gzip", gzipped(b"[" * 10**7), 413)],
)  # fmt: skip
def test_bodies_that_cannot_be_decompressed_are_refused_as_such(
    server: Server, encoding: str, data: bytes, status: int
) -> None:
    answer = server.post(PATH, data, **{"Content-Encoding": encoding})
    assert answer.status == status
    assert answer.error["code"] in ("invalid_encoding", "unsupported_encoding", "body_too_large")


@pytest.mark.parametrize("sent", ["schlüssel".encode(), "schlüssel".encode("latin-1")])
@pytest.mark.parametrize(("right", "status"), [(True, b"200"), (False, b"401")])
def test_keys_may_hold_any_letters(
    model_directory: Path, tmp_path: Path, sent: bytes, right: bool, status: bytes
) -> None:
    (tmp_path / "keys").write_text("schlüssel\n" if right else "schlussel\n")
    with stub_server(model_directory, {"api_key_file": str(tmp_path / "keys")}) as server, connected(server) as client:
        client.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + sent + b"\r\n\r\n"
        )
        assert received(client)[9:12] == status


# Browsers

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [(["http://a:3000"], "http://a:3000", True), (["*"], "http://b", True), (["http://a:3000"], "http://a", False), ([], "http://a", False)],
)  # fmt: skip
def test_pages_of_allowed_origins_may_ask(
    model_directory: Path, allowed: list[str], origin: str, answered: bool
) -> None:
    with stub_server(model_directory, {"cors_origins": allowed}) as server:
        preflight = server.request("OPTIONS", PATH, headers={"Origin": origin, **PREFLIGHT})
        answers = [server.get("/v1/models", Origin=origin), server.post(PATH, {"prompt": 5}, Origin=origin)]
        for answer in (preflight, *answers):
            assert answer.headers.get("access-control-allow-origin") == (origin if answered else None)
        assert preflight.status == (204 if allowed else 405)
        assert (preflight.headers.get("access-control-allow-headers") == "authorization,content-type") is answered


def test_a_preflight_needs_no_key_but_the_request_does(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k\n")
    settings = {"cors_origins": ["*"], "api_key_file": str(tmp_path / "keys")}
    with stub_server(model_directory, settings) as server:
        assert server.request("OPTIONS", PATH, headers={"Origin": "http://a", **PREFLIGHT}).status == 204
        assert server.post(PATH, {"prompt": "a"}, Origin="http://a").status == 401


@pytest.mark.parametrize("origin", ["a.example", "http://a/path", "", "http://"])
def test_what_is_not_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin"):
        FrontendSettings(cors_origins=(origin,))


# Proxies


def test_idle_connections_outlive_the_pools_of_proxies() -> None:
    assert FrontendSettings().keep_alive_seconds > 90


def test_headers_come_before_a_slow_first_token(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=2.0) as server, connected(server) as client:
        started = time.monotonic()
        client.sendall(raw(PATH, {"prompt": "ab", "max_tokens": 1, "stream": True}))
        head = client.recv(65_536)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"data:" not in head
        assert received(client, b"[DONE]").count(b"data: ") == 2
        assert time.monotonic() - started >= 2.0, "the stub's step"


def test_a_refusal_of_the_engine_still_has_its_own_status(server: Server, model_directory: Path) -> None:
    from .stub_server import FORBIDDEN_TOKEN, FULL_TOKEN

    for token, status in ((FORBIDDEN_TOKEN, 400), (FULL_TOKEN, 429)):
        assert server.post(PATH, {"prompt": [token], "stream": True}).status == status


def test_streams_to_http_1_0_clients_have_no_chunk_framing(server: Server) -> None:
    with connected(server) as client:
        client.sendall(raw(PATH, {"prompt": "ab", "max_tokens": 5, "stream": True}, version="1.0"))
        body = received(client).partition(b"\r\n\r\n")[2]
    assert all(line.startswith(b"data: ") for line in body.split(b"\n\n") if line)
    assert body.endswith(b"data: [DONE]\n\n")


# Clients that do not read


@pytest.mark.parametrize(("stream", "num_processes"), [(True, 1), (False, 1), (True, 3)])
def test_a_client_that_reads_nothing_keeps_neither_its_place_nor_a_drain(
    model_directory: Path, stream: bool, num_processes: int
) -> None:
    settings = {"unread_seconds": 0.5, "draining_unread_seconds": 0.5, "num_processes": num_processes}
    with (
        stub_server(model_directory, settings, max_model_len=8000, max_open_requests=12) as server,
        socket.socket() as client,
    ):
        address = urlsplit(server.url)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        prompts = [[index % 300 + 20 for index in range(7000)] for _ in range(12)]
        client.sendall(raw(PATH, {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": 1, "stream": stream}))
        server.lines_with(f"POST {PATH} ")  # logged when it is over
        assert server.post(PATH, {"prompt": [[20]] * 12, "max_tokens": 1}).status == 200
        status, _ = server.drain()
    assert status == 0


# Counting


def test_cached_tokens_count_once_for_several_answers_to_one_prompt(server: Server) -> None:
    usage = server.post(PATH, {"prompt": "abcdefgh", "n": 4, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4, "the stub says 4 for each"
    assert usage["completion_tokens"] == 4


def test_a_body_with_two_lengths_is_refused_and_the_connection_closed(server: Server) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(server) as client:
        client.sendall(head + b"%x\r\n%b\r\n0\r\n\r\nGET /admin HTTP/1.1\r\nHost: x\r\n\r\n" % (len(body), body))
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"ambiguous_length" in answer


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
def test_an_offer_of_another_protocol_is_passed_over_without_a_word(model_directory: Path, offer: str) -> None:
    """Java's HTTP client offers HTTP/2 with every request."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": offer, "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    with stub_server(model_directory, {}) as server:
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, **headers).status == 200
        status, errors = server.drain()
    assert status == 0
    assert "pgrade" not in errors
    assert "WebSocket" not in errors
