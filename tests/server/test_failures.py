"""What happens when a rank is lost, stopped or stuck: clients are told, the report names the rank, nothing is left running."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .test_lifecycle import events
from .test_serve import LONG, serve_tiny, tiny

__all__ = ["tiny"]


@pytest.fixture(autouse=True)
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports are kept."""
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))
    return tmp_path / "failures"


@pytest.mark.parametrize("rank", [1, 3])
def test_a_stopped_rank_under_load_ends_the_job_and_is_named(tiny: Path, rank: int, reports: Path) -> None:
    with serve_tiny(tiny, 4, "--stall-timeout", "4") as job:
        streams = [job.server.open_stream("/v1/completions", LONG) for _ in range(4)]
        pid = job.rank(rank)
        os.kill(pid, signal.SIGSTOP)
        for stream in streams:
            error = events(stream)[-1]["error"]
            assert error["code"] == "engine_failed"
            assert f"rank {rank} (" in error["message"]
        status, errors = job.server.wait()
        assert status != 0
        assert f"pid {pid}) has given no sign of life" in errors
        assert job.seconds_until_gone() < 10
    (report,) = reports.iterdir()
    text = report.read_text()
    assert "no sign of life" in text
    assert all(f"  rank {number} (" in text for number in range(4))
    assert "thread MainThread" in text


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_rank_of_an_idle_server_turns_health_red_and_ends_the_job(tiny: Path, rank: int) -> None:
    with serve_tiny(tiny, 4, "--stall-timeout", "5") as job:
        assert job.server.get("/health").status == 200
        os.kill(job.rank(rank), signal.SIGSTOP)
        while (answer := job.server.get("/health")).status == 200:
            continue
        assert answer.status == 503
        status, errors = job.server.wait()
        assert status != 0
        assert f"rank {rank} (" in errors
        assert "no sign of life" in errors
        assert job.seconds_until_gone() < 10


def test_a_rank_that_goes_on_in_time_is_forgiven(tiny: Path) -> None:
    with serve_tiny(tiny, 4) as job:
        pid = job.rank(2)
        os.kill(pid, signal.SIGSTOP)
        while job.server.get("/health").status == 200:
            continue
        os.kill(pid, signal.SIGCONT)
        while job.server.get("/health").status != 200:
            continue
        assert job.server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status == 200


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_killed_rank_ends_the_job_and_is_reported(tiny: Path, rank: int) -> None:
    with serve_tiny(tiny) as job:
        stream = job.server.open_stream("/v1/completions", LONG)
        os.kill(job.rank(rank), signal.SIGKILL)
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
        status, errors = job.server.wait()
        assert status != 0
        assert "has ended" in errors
