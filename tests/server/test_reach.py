"""What a server is open to, and whom it talks to: the ports that were asked for, and no one."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .jobs import serve
from .servers import Server, start

LISTENING = "0A"
THIS_MACHINE = "0100007F"
AUDIT = """
import os, sys

def watch(event, args):
    if event == "socket.getaddrinfo" or (event in ("socket.connect", "socket.sendto") and isinstance(args[-1], tuple)):
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{event} {args}\\n")

sys.addaudithook(watch)
with open(os.environ["CONNECTIONS"], "a") as file:
    file.write(f"watching {sys.orig_argv[2]}\\n")
"""


def listening_addresses(pids: list[int]) -> set[tuple[str, int]]:
    """Hexadecimal address and port of every TCP socket on which one of the processes listens."""
    inodes = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()}
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    found = [line[1].split(":") for line in lines if line[3] == LISTENING and f"socket:[{line[9]}]" in inodes]
    return {(address, int(port, 16)) for address, port in found}


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_job_listens_on_its_two_ports_of_this_machine_only(num_ranks: int) -> None:
    """Ranks of MPI are left out: its library opens ports between them."""
    with serve(num_ranks, "--grpc-port", "0") as job:
        grpc_port = int(job.server.lines_with("gRPC ")[0].rpartition(":")[2])
        addresses = listening_addresses([*job.http_processes(), *([] if num_ranks else [job.server.process.pid])])
    assert {port for _, port in addresses} == {urlsplit(job.server.url).port, grpc_port}
    assert all(address.endswith(THIS_MACHINE) for address, _ in addresses)


@dataclass(frozen=True, slots=True)
class Watched:
    """A server, the file of what its processes connected to, and an address where nobody may come."""

    server: Server
    connections: Path
    url: str
    canary: socket.socket


@pytest.fixture(scope="module")
def watched(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("audit")
    (directory / "sitecustomize.py").write_text(AUDIT)
    command = [
        sys.executable,
        "-m",
        "tests.server.stub_server",
        '{"port": 0}',
        json.dumps({"directory": str(model_directory)}),
    ]
    environment = {"PYTHONPATH": str(directory), "CONNECTIONS": str(directory / "connections")}
    with start(command, **environment) as server, socket.create_server(("127.0.0.1", 0)) as canary:
        server.wait_for("READY")
        canary.setblocking(False)
        yield Watched(server, directory / "connections", f"http://127.0.0.1:{canary.getsockname()[1]}", canary)


def bodies(url: str) -> list[dict[str, Any]]:
    """Requests of each protocol that name an address wherever one may stand."""
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": url}}}
    contents: list[Any] = [
        url,
        [{"type": "image_url", "image_url": {"url": url}}],
        [{"type": "image", "source": {"type": "url", "url": url}}],
        [{"type": "document", "source": {"type": "url", "url": url}}],
    ]
    chats = [{"max_tokens": 3, "messages": [{"role": "user", "content": content}]} for content in contents]
    return [
        *chats,
        {**chats[0], "user": url, "metadata": {"callback": url}},
        {**chats[0], "response_format": schema},
        {"prompt": url, "max_tokens": 3, "response_format": schema},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}], "tools": [{"type": "mcp", "server_url": url}]},
        {"text_input": url, "max_tokens": 3, "id": url, "callback": url},
    ]  # fmt: skip


ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/v2/models/ensemble/generate",
)
HEADERS = ("X-Request-Id", "Origin", "Referer", "Forwarded", "X-Forwarded-Host", "Traceparent", "Webhook-Url")


def test_whatever_a_request_names_the_server_connects_to_no_one(watched: Watched) -> None:
    for path in ROUTES:
        for body in bodies(watched.url):
            assert watched.server.post(path, body, **dict.fromkeys(HEADERS, watched.url)).status in (200, 400)
    assert watched.server.get(f"{watched.url}/v1/models").status == 200
    with pytest.raises(BlockingIOError):
        watched.canary.accept()
    assert set(watched.connections.read_text().splitlines()) == {
        "watching tests.server.stub_server",
        "watching launch.http_process",
    }
