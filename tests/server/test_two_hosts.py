"""A job over two hosts, made of namespaces: it answers as on one host, and a lost network or host ends it and is named."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.two_hosts import TwoHosts, two_hosts

from .jobs import Job, is_open_mpi, mpirun, serve
from .test_lifecycle import events
from .test_serve import LONG, serve_tiny, tiny
from .test_supervise import supervised

__all__ = ["tiny"]

pytestmark = pytest.mark.slow  # make test-launchers

ANSWER = {"prompt": "ab", "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "temperature": 0}


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    """Reports are kept in the test's directory."""
    if is_open_mpi():
        pytest.skip("the launcher over two hosts is MPICH's, not Open MPI's")
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))
    with two_hosts(tmp_path) as made:
        yield made


@contextlib.contextmanager
def serve_on(hosts: TwoHosts, tiny: Path) -> Iterator[Job]:
    """tp 2 on each of two hosts, which are the stages of pp 2."""
    flags = ("--model", str(tiny), "--load-format", "dummy", "--tp", "2", "--pp", "2", "--stall-timeout", "4")
    with serve(4, *flags, launcher_flags=hosts.launcher_flags(2), prefix=[str(hosts.first.enter)]) as job:
        yield job


def test_two_hosts_answer_as_one_does(hosts: TwoHosts, tiny: Path) -> None:
    with serve_tiny(tiny, 4) as job:
        expected = job.server.post("/v1/completions", ANSWER).json["choices"]
    with serve_on(hosts, tiny) as job:
        assert job.server.get("/health").status == 200
        assert job.server.post("/v1/completions", ANSWER).json["choices"] == expected
        status, errors = job.server.drain()
    assert (status, "do not watch each other" in errors) == (0, False), errors


@pytest.mark.parametrize("is_host_lost", [False, True], ids=["network", "host"])
def test_a_lost_network_or_host_ends_the_job_and_its_ranks_are_named(
    hosts: TwoHosts, tiny: Path, tmp_path: Path, is_host_lost: bool
) -> None:
    with serve_on(hosts, tiny) as job:
        stream = job.server.open_stream("/v1/completions", LONG)
        hosts.unplug()
        if is_host_lost:
            hosts.second.kill_all()
        error = events(stream)[-1]["error"]
        assert error["code"] == "engine_failed"
        assert re.search(rf"rank [23] \({hosts.second.name}, pid ", error["message"])
        assert "it is stopped, or its host or network is gone" in job.server.lines_with("no sign of life")[0]
        assert job.seconds_until_only_the_launcher_runs() < 10
        job.server.process.kill()  # Hydra waits for its proxy on the lost host until TCP gives up
    (report,) = (tmp_path / "failures").iterdir()
    text = report.read_text()
    assert all(f"rank {rank} ({hosts.second.name}, pid " in text for rank in (2, 3))
    assert all(f"rank {rank} ({hosts.first.name}, pid " in text for rank in (0, 1))


def test_under_a_supervisor_a_lost_network_ends_the_launcher_too(hosts: TwoHosts, tiny: Path) -> None:
    flags = ("--tp", "2", "--pp", "2", "--stall-timeout", "4", "--max-restarts", "0")
    launcher = shlex.join([str(hosts.first.enter), mpirun(), *hosts.launcher_flags(2), "-n", "4"])
    with supervised(tiny, 4, *flags, "--launcher", launcher) as job:
        stream = job.server.open_stream("/v1/completions", LONG)
        hosts.unplug()
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
        status, errors = job.server.wait()
    assert status == 1, errors
    assert "does not end although rank 0 is gone" in errors
    assert "the ranks failed 1 times in a row (--max-restarts 0)" in errors


def test_processes_of_a_host_that_end_are_named_at_once(hosts: TwoHosts, tiny: Path) -> None:
    with serve_on(hosts, tiny) as job:
        stream = job.server.open_stream("/v1/completions", LONG)
        hosts.second.kill_all()
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
        status, errors = job.server.wait()
        assert status != 0
        # The launcher's process on that host ends, too, so mpirun kills the other ranks: rank 0 may not come to name one.
        assert f"({hosts.second.name}, pid " in errors or "the launcher may have ended it" in errors
