"""The examples of docs/triton.md run as they are, but for the address."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.servers import Server, stub_server

pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "triton.md").read_text()
EXAMPLES = re.findall(r"```(bash|python)\n(.*?)```", DOCUMENT, re.DOTALL)


def run(server: Server, command: list[str], example: str) -> list[str]:
    code = example.replace("localhost:8000", server.url.removeprefix("http://"))
    code = code.replace("localhost:8001", f"127.0.0.1:{server.wait_for('GRPC').split()[1]}")
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def examples(language: str, word: str) -> list[str]:
    return [code for kind, code in EXAMPLES if kind == language and word in code]


def test_curl_examples(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    (example,) = examples("bash", "curl")
    first, *stream = [line.removeprefix("data: ") for line in run(server, ["bash", "-c"], example) if line]
    # The first command's answer has no end of line.
    whole, _, event = first.partition("}data: ")
    assert json.loads(whole + "}" * bool(event))["text_output"] == "def main(def main"
    pieces = [json.loads(line)["text_output"] for line in ([event] if event else []) + stream]
    assert "".join(pieces) == "def main"


def test_the_http_client_example(server: Server) -> None:
    (example,) = examples("python", "tritonclient.http")
    assert run(server, [sys.executable, "-c"], example) == ["def main(def main"]


def test_the_grpc_client_example(model_directory: Path) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    (example,) = examples("python", "tritonclient.grpc")
    with stub_server(model_directory, {"grpc_port": 0}) as server:
        assert run(server, [sys.executable, "-c"], example) == ["def main(def main", "def main"]
