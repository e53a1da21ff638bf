"""AIPerf itself (the successor of genai-perf), from an environment of its own: ``make test-aiperf`` installs it and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .jobs import serve
from .test_clients import DEMO, MODEL


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_hundred_requests_of_aiperf_have_no_error(endpoint: str, tmp_path: Path) -> None:
    program = os.environ.get("PHALANX_AIPERF")
    if program is None:
        pytest.skip("slow; run by make test-aiperf")
    with serve(2) as job:
        arguments = [
            "-m", MODEL, "--url", job.server.url, "--endpoint-type", endpoint, "--streaming", "--tokenizer", str(DEMO),
            "--request-count", "100", "--concurrency", "8", "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8",
            "--artifact-dir", str(tmp_path), "--ui", "simple",
        ]  # fmt: skip
        done = subprocess.run(
            [program, "profile", *arguments], capture_output=True, text=True, timeout=280, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert (report["request_count"]["avg"], report["error_summary"]) == (100, [])
    scraped = json.loads((tmp_path / "server_metrics_export.json").read_text())["summary"]
    assert scraped["endpoints_successful"] == [f"{job.server.url}/metrics"]
