"""What every request passes: keys, request ids, the state of the server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.server.app import server_routes
from phalanx.runtime.server.gate import OPEN_WITHOUT_KEY, Gate
from phalanx.runtime.server.link.messages import Phase, encode_frame
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.api_keys import read_api_keys

from .engine_clients import make_client
from .servers import Server, start, stub_server

ROUTES = {
    "/version": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/models/stub": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/tokenizer_info": "GET",
    "/nothing": "GET",
}


@pytest.fixture(scope="module")
def locked(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# our two teams\nfirst-secret\n\n  second-secret  \n")
    with stub_server(model_directory, {"api_key_file": str(keys), "model_names": ["stub"]}) as running:
        yield running


@pytest.mark.parametrize(("path", "method"), ROUTES.items())
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first", "Basic first-secret", "first-secret"]
)
def test_every_route_needs_a_key(locked: Server, path: str, method: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = locked.request(method, path, headers=headers)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_no_route_of_the_table_but_probes_is_open(locked: Server) -> None:
    paths = {
        (re.sub(r"\{.*?\}", "x", route.path), method)
        for route in server_routes(None, None)  # type: ignore[arg-type]
        for method in route.methods or ()
    }
    without_key = {path for path, method in paths if locked.request(method, path).status != 401}
    assert without_key == OPEN_WITHOUT_KEY


@pytest.mark.parametrize("path", sorted(OPEN_WITHOUT_KEY))
def test_probes_need_no_key(locked: Server, path: str) -> None:
    assert locked.get(path).status == 200


@pytest.mark.parametrize("key", ["first-secret", "second-secret"])
def test_each_key_opens_the_server(locked: Server, key: str) -> None:
    assert locked.get("/v1/models", Authorization=f"Bearer {key}").status == 200
    answer = locked.post("/v1/completions", {"prompt": "a"}, Authorization=f"Bearer {key}")
    assert answer.status == 200


def test_comments_in_the_key_file_are_no_keys(locked: Server) -> None:
    assert locked.get("/v1/models", Authorization="Bearer # our two teams").status == 401


def test_keys_and_prompts_are_not_logged(locked: Server) -> None:
    body = {"prompt": "canary prompt", "max_tokens": 1}
    answer = locked.post("/v1/completions", body, Authorization="Bearer first-secret", **{"X-Request-Id": "canary-id"})
    assert answer.status == 200
    assert any("canary-id POST /v1/completions 200" in line for line in locked.lines_with("canary-id"))
    assert not any("canary prompt" in line or "secret" in line for line in locked.lines)
    shown = locked.get("/metrics", Authorization="Bearer first-secret")
    assert b"canary" not in shown.body
    assert b"secret" not in shown.body


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "holds no key"),
        (b"\n\n", "holds no key"),
        (b"# only a comment\n", "holds no key"),
        (b"good\n\0\0\0\n", "line 2 holds a character that cannot be printed"),
        ("secret\n".encode("utf-16"), "is not UTF-8"),
        ("secret\n".encode("utf-16-le"), "line 1 holds a character that cannot be printed"),
        (b"two\twords\n", "line 1 holds a character that cannot be printed"),
    ],
)
def test_a_key_file_without_keys_or_with_one_that_nobody_can_send_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--api-key-file .*{said}"):
        read_api_keys(str(file))


def test_a_key_file_of_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("one\r\nzwölf\r\n".encode("utf-8-sig"))
    assert read_api_keys(str(file)) == (b"one", "zwölf".encode())


def test_comments_in_a_key_file_may_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"# team A\trotated\n \t# \x1b[1mteam B\none\n")
    assert read_api_keys(str(file)) == (b"one",)


def test_a_missing_key_file_ends_the_server(model_directory: Path) -> None:
    with stub_server(model_directory, {"api_key_file": "/nowhere"}, wait_for="") as server:
        status, errors = server.wait()
    assert status == 2
    assert errors == "--api-key-file /nowhere cannot be read: No such file or directory; check the path\n"


@pytest.mark.parametrize("given", ["abc-1.2:3_4", "x" * 128])
def test_a_request_id_is_echoed(server: Server, given: str) -> None:
    assert server.get("/version", **{"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "http://host/", "a b", "a\tb", "é"])
def test_a_request_id_that_is_none_is_replaced(server: Server, given: str) -> None:
    answer = server.get("/version", **{"X-Request-Id": given})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        FrontendSettings(host=host)
    assert FrontendSettings(host=host, insecure=True).host == host
    assert FrontendSettings(host=host, api_key_file="keys").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_this_machine_needs_none(host: str) -> None:
    assert FrontendSettings(host=host).host == host


def test_help_needs_no_server() -> None:
    import sys

    with start([sys.executable, "-m", "launch.serve", "--help"]) as server:
        assert server.wait()[0] == 0


def test_probes_are_logged_at_debug_only(model_directory: Path) -> None:
    with stub_server(model_directory, {}) as server:
        server.get("/health")
        server.get("/metrics")
        server.get("/v1/models")
        server.lines_with("/v1/models")
        assert not [line for line in server.lines if "/health" in line or "/metrics" in line]


def test_log_level_debug_shows_probes_and_warning_shows_no_request(model_directory: Path) -> None:
    with stub_server(model_directory, {"log_level": "debug"}) as server:
        server.get("/health")
        assert len(server.lines_with("GET /health 200")) == 1
    with stub_server(model_directory, {"log_level": "warning"}) as server:
        server.get("/v1/models")
    _, said = server.wait()
    assert "/v1/models" not in said


def test_json_logs_have_a_field_for_each_value_and_no_content(model_directory: Path) -> None:
    with stub_server(model_directory, {"log_format": "json"}) as server:
        server.post("/v1/completions", {"prompt": "a secret", "max_tokens": 1}, **{"X-Request-Id": "mine"})
        (line,) = server.lines_with("/v1/completions")
    entry = json.loads(line)
    expected = {"level": "info", "request_id": "mine", "method": "POST", "path": "/v1/completions", "status": 200}
    assert expected.items() <= entry.items()
    assert entry["seconds"] >= 0
    assert "secret" not in line


def test_a_request_before_the_engine_is_ready_learns_what_it_waits_for() -> None:
    """As rank 0 tells it: the phase, and how much of it is done."""
    client = make_client()
    sent: list[dict[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def ask() -> None:
        await Gate(Response(), client, ())(
            {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}, receive, send
        )

    client.data_received(encode_frame(Phase("loading weights, 41 %")))
    asyncio.run(ask())
    assert sent[0]["status"] == 503
    message = json.loads(sent[1]["body"])["error"]["message"]
    assert message == "the server is starting (loading weights, 41 %); try again in a moment"
