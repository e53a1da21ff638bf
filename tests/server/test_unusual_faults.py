"""Faults within a step, and around the HTTP processes: no hang, nothing left running, no wrong token, the right rank named."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .jobs import Job, serve
from .test_lifecycle import events
from .test_serve import LONG, serve_tiny, tiny

__all__ = ["tiny"]

PATH = "/v1/completions"
FAULTY = """
# launch.serve: by this word a job finds its ranks
import ctypes, importlib, os, sys, threading, time, launch
from phalanx.launch import serve
from phalanx.launch.arguments import run_command
from phalanx.parallel.errors import CommunicatorError
from phalanx.parallel.launcher import launch_info
from phalanx.parallel.liveness import ending

def faulty(executor):
    class Faulty(executor):
        def execute(self, plan):
            if os.path.exists({trigger!r}):
                exec({faults!r}.get(launch_info().rank, ""), globals(), {{"self": self}})
            super().execute(plan)
    return Faulty

for folder, name in {executors!r}:
    build = importlib.import_module(f"phalanx.runtime.executors.{{folder}}.build")
    setattr(build, name, faulty(getattr(build, name)))
threading.Thread(target=exec, args=({background!r}.get(launch_info().rank, ""), globals()), daemon=True).start()
run_command(serve.main, sys.argv[1:])
"""
EXECUTORS = {
    "numpy": [("numpy", "NumpyExecutor")],
    "cuda": [("cuda", "CudaExecutor")],
    "tensorrt": [("cuda", "CudaExecutor"), ("tensorrt", "TrtExecutor")],  # segments run in a step of the former
}
"""Where they are built, by engine."""
ANSWER = {"prompt": "ab", "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "temperature": 0}


@pytest.fixture(autouse=True)
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports are kept."""
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))
    return tmp_path / "failures"


@contextlib.contextmanager
def serve_faulty(
    tiny: Path, directory: Path, faults: Mapping[int, str], *flags: str, num_ranks: int = 4, engine: str = "numpy",
    background: Mapping[int, str] | None = None,
) -> Iterator[tuple[Job, Path]]:  # fmt: skip
    """A job, tp 2 x pp 2 unless told otherwise, and a path: once a file is there, ranks do what ``faults`` says in their next step.

    ``background``: what a thread of each rank does from the start.
    """
    trigger = directory / "trigger"
    code = FAULTY.format(
        executors=EXECUTORS[engine], trigger=str(trigger), faults=dict(faults), background=background or {}
    )
    layout = flags or ("--tp", "2", "--pp", "2")
    model = ("--model", str(tiny), "--load-format", "dummy", "--engine", engine)
    with serve(num_ranks, *model, *layout, "--stall-timeout", "4", program=("-c", code)) as job:
        yield job, trigger


def assert_a_fault_ends_every_stream_and_names_the_rank(job: Job, trigger: Path, rank: int) -> str:
    """Let it happen under load; what the job wrote to standard error."""
    streams = [job.server.open_stream(PATH, LONG) for _ in range(2)]
    trigger.touch()
    for stream in streams:
        error = events(stream)[-1]["error"]
        assert error["code"] == "engine_failed"
        assert f"rank {rank} (" in error["message"]
    status, errors = job.server.wait()
    assert status not in (0, 2)
    assert job.seconds_until_gone() < 10
    return errors


FAULTS = [
    ("raise MemoryError('planted')", "not enough memory: planted"),
    ("os._exit(0)", "has ended"),
    ("sys.exit(0)", "SystemExit: 0"),
    ("while True: pass", "no step has ended"),
    ("ctypes.PyDLL(None).sleep(1000)", "no sign of life"),
    ("os.close(2); raise ZeroDivisionError('planted')", "ZeroDivisionError: planted"),
    ("ctypes.string_at(0)", "has ended"),
    ("open(os.fsdecode(b'gone-\\xff'))", "No such file or directory: 'gone-"),
]
"""Code, and what is said of it: four keep Python from running, close standard error, crash, and name a file that is not UTF-8."""
QUICK = (0, 1)
"""Run on one rank each by default; all on both by ``make test-launchers``."""


@pytest.mark.parametrize(
    ("rank", "fault", "said"),
    [
        pytest.param(rank, *fault, marks=() if (number in QUICK and rank == 3 * (number % 2)) else pytest.mark.slow)
        for number, fault in enumerate(FAULTS)
        for rank in (0, 3)
    ],
)
def test_a_fault_in_a_step_ends_every_stream_and_names_the_rank(
    tiny: Path, tmp_path: Path, reports: Path, rank: int, fault: str, said: str
) -> None:
    with serve_faulty(tiny, tmp_path, {rank: fault}) as (job, trigger):
        errors = assert_a_fault_ends_every_stream_and_names_the_rank(job, trigger, rank)
    if rank == 0 and "os.close(2)" in fault:  # nothing of rank 0 reaches the launcher any more
        errors = "".join(report.read_text() for report in reports.iterdir())
    assert said in errors
    assert re.search(rf"rank {rank}\b", errors)


LOST_PEER = "open({noticed!r}, 'w').close(); raise CommunicatorError('planted: a peer is gone')"
PATIENT = "ending.CAUSE_SECONDS, ending.ANSWER_SECONDS = 30, 60"
GONE = "while not os.path.exists({noticed!r}): time.sleep(0.01)\nos._exit(0)"


@pytest.mark.parametrize(
    ("noticed_by", "gone"),
    [(3, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, 0), (2, 0), (0, 3), (0, 2)])],
)
def test_of_a_rank_and_one_that_could_not_reach_it_the_former_is_named(
    tiny: Path, tmp_path: Path, noticed_by: int, gone: int
) -> None:
    """Whose message comes first is the network's choice: here that of the one that could not reach the other."""
    noticed = str(tmp_path / "noticed")
    background = dict.fromkeys(range(4), PATIENT) | {gone: f"{PATIENT}\n{GONE.format(noticed=noticed)}"}
    faults = {noticed_by: LOST_PEER.format(noticed=noticed)}
    with serve_faulty(tiny, tmp_path, faults, background=background) as (job, trigger):
        errors = assert_a_fault_ends_every_stream_and_names_the_rank(job, trigger, gone)
    assert "has ended" in errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_could_not_reach_another_is_named_if_none_is_gone(tiny: Path, tmp_path: Path, rank: int) -> None:
    faults = {rank: LOST_PEER.format(noticed=str(tmp_path / "noticed"))}
    with serve_faulty(tiny, tmp_path, faults) as (job, trigger):
        errors = assert_a_fault_ends_every_stream_and_names_the_rank(job, trigger, rank)
    assert "a peer is gone" in errors


def test_an_http_process_that_is_stopped_for_a_moment_answers_all_it_had_open(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--http-processes", "2") as job:
        streams = [job.server.open_stream(PATH, LONG) for _ in range(4)]
        stopped = job.http_processes()[0]
        os.kill(stopped, signal.SIGSTOP)
        threading.Event().wait(0.5)  # how long it is stopped, not a wait for something
        os.kill(stopped, signal.SIGCONT)
        assert all(events(stream)[-1]["choices"][0]["finish_reason"] == "length" for stream in streams)


def test_a_killed_http_process_of_several_ends_the_job_and_is_named(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--http-processes", "3") as job:
        pid = job.http_processes()[1]
        os.kill(pid, signal.SIGKILL)
        status, errors = job.server.wait()
        assert status not in (0, 2)
        assert f"(pid {pid}) is gone" in errors
        assert job.seconds_until_gone() < 10


def test_a_server_without_free_descriptors_answers_who_is_connected_and_others_later(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--http-processes", "1") as job:
        expected = job.server.post(PATH, ANSWER).json["choices"]
        for pid in (job.http_process(), job.rank(0), job.rank(1)):
            count = len(os.listdir(f"/proc/{pid}/fd")) + 2
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, count))
        stream = job.server.open_stream(PATH, LONG)
        with contextlib.ExitStack() as stack:
            address = urlsplit(job.server.url)
            for _ in range(20):
                stack.enter_context(socket.create_connection((address.hostname or "", address.port or 0)))
            assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert job.server.post(PATH, ANSWER).json["choices"] == expected
        os.kill(job.rank(1), signal.SIGKILL)
        assert "rank 1 (" in job.server.wait()[1]


def test_a_report_that_cannot_be_kept_is_printed_all_the_same(tiny: Path, reports: Path) -> None:
    reports.write_text("not a directory")
    with serve_tiny(tiny, 2) as job:
        os.kill(job.rank(1), signal.SIGKILL)
        errors = job.server.wait()[1]
        assert "rank 1 (" in errors
        assert f"the report could not be kept in {reports}: " in errors


def test_an_endpoint_file_that_cannot_be_removed_keeps_nobody_from_hearing_which_rank_is_lost(
    tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "endpoint.json"
    with serve_tiny(tiny, 2, "--endpoint-file", str(file)) as job:
        file.unlink()
        file.mkdir()
        stream = job.server.open_stream(PATH, LONG)
        os.kill(job.rank(1), signal.SIGKILL)
        assert "rank 1 (" in events(stream)[-1]["error"]["message"]
        assert "rank 1 (" in job.server.wait()[1]
