"""``POST /admin/drain``: for administrators only, and the same as a signal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from .servers import Server, stub_server
from .test_lifecycle import LONG, PATH, events
from .test_serve import LONG as LONGER
from .test_serve import serve_tiny, tiny

__all__ = ["tiny"]

DRAIN = "/admin/drain"


def test_without_any_key_nobody_may_drain(server: Server) -> None:
    answer = server.post(DRAIN, {})
    assert (answer.status, answer.error["code"]) == (403, "admin_key_required")
    assert "--admin-key-file" in answer.error["message"]


def test_an_api_key_is_no_admin_key_where_there_are_admin_keys(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("user\n")
    (tmp_path / "admins").write_text("root\n")
    files = {"api_key_file": str(tmp_path / "keys"), "admin_key_file": str(tmp_path / "admins")}
    with stub_server(model_directory, files) as server:
        for key in ("user", "nothing"):
            assert server.post(DRAIN, {}, Authorization=f"Bearer {key}").status == 401
        assert server.get("/v1/models", Authorization="Bearer root").status == 401
        assert server.get(DRAIN, Authorization="Bearer root").status == 405
        assert server.post(DRAIN, {}, Authorization="Bearer root").json == {"status": "draining", "open_requests": 0}
        assert server.wait()[0] == 0


def test_a_drain_by_route_answers_what_is_open_and_may_be_asked_for_twice(
    model_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("user\n")
    admin = {"Authorization": "Bearer user"}
    settings = {"api_key_file": str(tmp_path / "keys")}
    with stub_server(model_directory, settings, step_seconds=0.01) as server:
        connection = server.connect()
        connection.request("POST", PATH, json.dumps({**LONG, "stream": True}), {**admin, "Connection": "close"})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: ")
        answers = [server.post(DRAIN, {}, **admin) for _ in range(2)]
        assert [(answer.status, answer.json["open_requests"]) for answer in answers] == [(202, 1)] * 2
        while (refused := server.get("/ready", **admin)).status == 200:
            continue
        assert refused.status == 503
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait()[0] == 0


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has come to the process and none of its threads has taken it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> number - 1 & 1 for mask in pending)


def test_a_drain_by_route_has_the_limit_of_a_signal_and_a_second_signal_cuts_it_short(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "admins").write_text("root\n")
    flags = ("--admin-key-file", str(tmp_path / "admins"))
    for limit, reason, expected in (("0.01", "--shutdown-timeout=0.01", 1), ("60", "told again", 143)):
        with serve_tiny(tiny, 0, *flags, "--shutdown-timeout", limit) as job:
            stream = job.server.open_stream(PATH, LONGER | {"n": 128})
            assert job.server.post(DRAIN, {}, Authorization="Bearer root").status == 202
            job.server.lines_with("draining")
            if expected != 1:
                os.kill(job.server.process.pid, signal.SIGUSR1)  # the same request, by another way
                while has_pending(job.server.process.pid, signal.SIGUSR1):  # of two the kernel would choose the order
                    continue
                os.kill(job.server.process.pid, signal.SIGTERM)
            assert reason in events(stream)[-1]["error"]["message"]
            assert job.server.wait()[0] == expected
