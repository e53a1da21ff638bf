"""Every example of the documents on clients runs, as it is written, against a whole job of two ranks."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.text.chat_templates import HERMES

from .jobs import Job, serve
from .servers import ROOT

PAGES = ("docs/howto/clients.md", "docs/triton.md")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = [
    pytest.param(language, text, id=f"{Path(page).stem}-{number}-{language}")
    for page in PAGES
    for number, (language, text) in enumerate(BLOCK.findall((ROOT / page).read_text()))
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The demo checkpoint with a chat template that takes tools."""
    model = tmp_path_factory.mktemp("models") / "phalanx-demo"
    shutil.copytree(ROOT / "checkpoints" / "demo", model)
    (model / "chat_template.jinja").write_text(HERMES)
    with serve(2, "--model", str(model), "--grpc-port", "0") as running:
        yield running


@pytest.mark.parametrize(("language", "text"), EXAMPLES)
def test_an_example_runs_as_it_is_written(
    job: Job, capfd: pytest.CaptureFixture[str], tmp_path: Path, language: str, text: str
) -> None:
    grpc_port = job.server.lines_with("gRPC ")[0].rpartition(":")[2].strip()
    text = text.replace("localhost:8000", job.server.url.removeprefix("http://")).replace(
        "localhost:8001", f"127.0.0.1:{grpc_port}"
    )
    if language == "python":  # here, because importing the clients again takes seconds
        (tmp_path / "example.py").write_text(text)
        made = runpy.run_path(str(tmp_path / "example.py"))
        for client in made.values():  # left to the end of the example's process, which here is the whole suite's
            if callable(close := getattr(client, "close", None)):
                close()
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, timeout=120)
    assert capfd.readouterr().out.strip()


def test_every_protocol_has_an_example() -> None:
    texts = "".join((ROOT / page).read_text() for page in PAGES)
    for route in (
        "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize", "/metrics",
        "/generate_stream", "tritonclient.http", "tritonclient.grpc", "import openai", "import anthropic",
    ):  # fmt: skip
        assert route in texts
