"""What the benchmark of models prints about a case that fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import bench_models
from tests.support.logs import why_it_failed


class Failing(bench_models.Case):
    """Prints seven lines and empty ones, and fails."""

    def command(self, num_iters: int, result: Path) -> list[str]:
        return [sys.executable, "-c", "print('\\n\\n'.join(map(str, range(7))), '\\n\\n \\n'); raise SystemExit(3)"]


def test_a_case_that_fails_says_why_last_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_models, "CASES", {"small": Failing("qwen3-8b", 1, 1)})
    monkeypatch.setattr(sys, "argv", ["bench_models", "small", "--out", str(tmp_path)])
    assert bench_models.main() == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"small failed: exit status 3; {re.escape(str(tmp_path))}/small.log ends with", first)
    assert [line.strip() for line in lines] == ["2", "3", "4", "5", "6"]


def test_a_command_without_output_or_end_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n")
    assert (
        why_it_failed(subprocess.TimeoutExpired("x", 300.0), log)
        == f"no result after 300 s; {log} ends with\n    nothing"
    )
