"""schemathesis from a separate environment: CI and ``make test-openapi`` install it and run this over all operations."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .servers import stub_server

LEFT_OUT = r"^/admin/drain$|^/v2/repository/models/\{model\}/(un)?load$"
"""One ends the server, the others answer 501, which is a server error to schemathesis."""
TOO_DEEP = "positive_data_acceptance"
"""A description says which types and limits a field has, not that a prompt fits the context or that two fields go together."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_server_error_and_no_answer_that_the_description_does_not_have(
    model_directory: Path, tmp_path: Path
) -> None:
    program = os.environ.get("PHALANX_SCHEMATHESIS")
    if program is None:
        pytest.skip("slow; run by make test-openapi")
    (tmp_path / "keys").write_text("secret\n")
    settings = {"model_names": ["stub"], "api_key_file": str(tmp_path / "keys")}
    with stub_server(model_directory, settings, max_open_requests=64) as server:
        arguments = [
            f"{server.url}/openapi.json", "--header", "Authorization: Bearer secret", "--seed", "2026",
            "--max-examples", os.environ.get("PHALANX_SCHEMATHESIS_EXAMPLES", "50"),
            "--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks", "all", "--exclude-checks", TOO_DEEP,
            "--exclude-path-regex", LEFT_OUT, "--continue-on-failure", "--no-shrink", "--warnings", "off",
            "--request-timeout", "60", "--suppress-health-check", "all",
        ]  # fmt: skip
        done = subprocess.run(
            [Path(program).absolute(), "run", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        print(done.stdout[-500:])
        assert server.get("/health").status == 200
    _, said = server.wait()
    assert "Traceback" not in said
