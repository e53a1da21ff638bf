"""``launch.serve --supervise``: the ranks come back, the clients stay."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx import launch
from phalanx.launch.supervise import _Supervisor
from phalanx.parallel import lateness
from phalanx.runtime.server.link.messages import DrainRequest, EngineGone, FromFrontend, FrontendReady

from .jobs import ENVIRONMENT, MARK, Job, mpirun
from .servers import start
from .test_lifecycle import events
from .test_serve import LONG, tiny

__all__ = ["tiny"]

PATH = "/v1/completions"
SLOW = {**LONG, "max_tokens": 250, "n": 32, "temperature": 0, "return_token_ids": True}
"""Seconds of work on a small model."""


@pytest.fixture(autouse=True)
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))


@contextlib.contextmanager
def supervised(tiny: Path, num_ranks: int, *flags: str, wait_for: str = "READY") -> Iterator[Job]:
    mark = uuid.uuid4().hex
    model = ("--model", str(tiny), "--load-format", "dummy", "--max-num-seqs", "128", "--http-processes", "2")
    path = f"{Path(mpirun()).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "launch.serve", "--supervise", "-n", str(num_ranks), "--port", "0"]
    with start([*command, *model, *flags], **{MARK: mark, "PATH": path}, **ENVIRONMENT) as server:
        job = Job(server, mark, num_ranks)
        if wait_for:
            server.wait_for(wait_for)
        yield job
    job.seconds_until_gone()


def engine(job: Job) -> int:
    """Process id of the only rank."""
    (pid,) = Path(f"/proc/{job.server.process.pid}/task/{job.server.process.pid}/children").read_text().split()[-1:]
    return int(pid)


def test_after_a_failure_streams_end_with_an_error_and_whole_answers_come_all_the_same(tiny: Path) -> None:
    with supervised(tiny, 2) as job:
        short = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        expected = job.server.post(PATH, short).json["choices"][0]["token_ids"]
        with ThreadPoolExecutor(1) as pool:
            stream = job.server.open_stream(PATH, LONG)
            whole = pool.submit(job.server.post, PATH, SLOW)
            while job.server.get("/metrics").body.find(b"phalanx_requests_running 33.0") < 0:
                continue
            os.kill(job.rank(1), signal.SIGKILL)
            assert events(stream)[-1]["error"]["code"] == "engine_failed"
            while (refused := job.server.post(PATH, short)).status == 503:
                assert "starting" in refused.error["message"]
            assert refused.json["choices"][0]["token_ids"] == expected
            answer = whole.result()
        assert answer.status == 200
        assert all(choice["token_ids"][:8] == expected for choice in answer.json["choices"])
        assert len(answer.json["choices"]) == 32
        assert job.server.lines_with("READY again")
        os.kill(job.server.process.pid, signal.SIGTERM)
        status, errors = job.server.wait()
        assert status == 0, errors
        assert "restart 1 of 10 in 0 s" in errors


def test_a_request_is_asked_again_once_only_and_restarts_are_limited(tiny: Path) -> None:
    with supervised(tiny, 1, "--max-restarts", "1") as job, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(job.server.post, PATH, SLOW)
        for count in range(2):
            job.server.wait_for("READY", count + 1)
            while job.server.get("/metrics").body.find(b"phalanx_requests_running 32.0") < 0:
                continue
            os.kill(engine(job), signal.SIGKILL)
        assert (whole.result().status, whole.result().error["code"]) == (500, "engine_failed")
        status, errors = job.server.wait()
        assert status == 128 + signal.SIGKILL
        assert "the ranks failed 2 times in a row (--max-restarts 1)" in errors


def test_a_mistake_is_not_repeated(tiny: Path) -> None:
    with supervised(tiny, 1, "--max-model-len", "100000", wait_for="") as job:
        status, errors = job.server.wait()
    assert status == 2
    assert "--max-model-len=100000" in errors
    assert "restart" not in errors


def test_a_drain_waits_for_answers_and_a_second_signal_does_not(tiny: Path) -> None:
    with supervised(tiny, 1) as job:
        stream = job.server.open_stream(PATH, {**LONG, "max_tokens": 100})
        os.kill(job.server.process.pid, signal.SIGTERM)
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        status, errors = job.server.wait()
        assert status == 0, errors
    with supervised(tiny, 1) as job:
        stream = job.server.open_stream(PATH, {**LONG, "n": 128})
        os.kill(job.server.process.pid, signal.SIGTERM)
        job.server.lines_with("draining")
        os.kill(job.server.process.pid, signal.SIGTERM)
        assert job.server.wait()[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("victim", ["supervisor", "HTTP process"])
def test_nothing_outlives_the_supervisor_or_the_http_side(tiny: Path, victim: str) -> None:
    with supervised(tiny, 2) as job:
        os.kill(job.server.process.pid if victim == "supervisor" else job.http_process(), signal.SIGKILL)
        assert job.server.wait()[0] != 0
        assert job.seconds_until_gone() < 10


def test_under_mpirun_the_supervisor_refuses_to_start(tiny: Path) -> None:
    command = [mpirun(), "-n", "2", sys.executable, "-m", "launch.serve", "--supervise", "--model", str(tiny)]
    with start(command, **ENVIRONMENT) as server:
        status, errors = server.wait()
    assert status == 2
    assert errors.count("without mpirun or srun") == 1


class SupervisedFrontend:
    """HTTP processes that say what is given."""

    def __init__(self, *messages: FromFrontend) -> None:
        self.channels, self.failure = self, ""
        self._messages = list(messages)

    def receive(self, timeout_seconds: float) -> list[tuple[int, FromFrontend]]:
        messages, self._messages = self._messages, []
        return [(0, message) for message in messages]

    def place(self, job: int) -> str:
        return str(job)

    def tell_failed(self, reason: str) -> None:
        self.failure = reason

    def tell_phase(self, text: str) -> None:
        return

    def stop(self) -> None:
        return


@pytest.mark.parametrize(
    ("messages", "start_seconds"),
    [([FrontendReady(1), EngineGone(1)], 1e6), ([], 0.0)],
    ids=["rank 0 lost", "no start"],
)
def test_a_launcher_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, messages: list[FromFrontend], start_seconds: float
) -> None:
    """As MPICH's with a lost host. It ignores SIGTERM here."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher inherits
    monkeypatch.setattr(launch.supervise, "LAUNCHER_SECONDS", 0.0)
    monkeypatch.setattr(launch.supervise, "LAUNCH_SECONDS", 0.0)
    monkeypatch.setattr(launch.supervise, "KILL_SECONDS", 0.1)
    frontend: Any = SupervisedFrontend(*messages)
    supervisor = _Supervisor(frontend, ["sleep", "1000"], 0, start_seconds)
    try:
        assert supervisor.run() == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert frontend.failure == "the ranks ended with status 1"
    assert supervisor.process is not None
    assert supervisor.process.returncode == -signal.SIGKILL


def test_time_in_which_the_whole_job_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lateness, "SUSPENDED_SECONDS", 500.0)
    frontend: Any = SupervisedFrontend()
    supervisor = _Supervisor(frontend, ["true"], 0, 1e6, end_by=100.0)
    supervisor._listen(0.0)
    assert supervisor.end_by == 100.0
    supervisor.lateness.due -= 1000.0
    supervisor._listen(0.0)
    assert supervisor.end_by >= 1100.0


def test_a_limit_that_news_sets_after_a_suspension_counts_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lateness, "SUSPENDED_SECONDS", 500.0)
    frontend: Any = SupervisedFrontend(EngineGone(1))
    supervisor = _Supervisor(frontend, ["true"], 0, 1e6, job=1)
    supervisor.lateness.due -= 1000.0
    supervisor._listen(0.0)
    assert supervisor.end_by <= time.monotonic() + launch.supervise.LAUNCHER_SECONDS


def test_what_is_said_late_of_a_job_does_not_count_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP processes notice the end of an engine by themselves, perhaps when the next one is on its way."""
    monkeypatch.setattr(launch.supervise, "LAUNCHER_SECONDS", 0.0)
    frontend: Any = SupervisedFrontend(EngineGone(0), FrontendReady(0), EngineGone(0))
    monkeypatch.setattr(launch.supervise, "HEARSAY_SECONDS", 0.0)
    supervisor = _Supervisor(frontend, ["sleep", "0.2"], 0, 1e6)
    assert supervisor.run() == 2  # nothing was heard of its own job
    assert supervisor.ready_at is None


@pytest.mark.parametrize(("messages", "status"), [([EngineGone(1)], 0), ([], 2)], ids=["told to end", "no rank"])
def test_a_launcher_that_starts_no_rank_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, messages: list[FromFrontend], status: int
) -> None:
    """``--launcher "mpirun --version"`` ends with status 0, as do ranks that Slurm told to end while they loaded."""
    monkeypatch.setattr(launch.supervise, "HEARSAY_SECONDS", 0.1)
    frontend: Any = SupervisedFrontend(*messages)
    assert _Supervisor(frontend, ["true"], 10, 1e6).run() == status
    assert ("true ended with status 0 and started no rank of phalanx serve; see --launcher" in caplog.text) == bool(
        status
    )


@pytest.mark.parametrize(
    ("numbers", "counted"),
    [((signal.SIGINT,), 2), ((signal.SIGTERM,), 1), ((signal.SIGTERM, signal.SIGINT), 2)],
    ids=["Ctrl-C", "SIGTERM", "both"],
)
def test_ctrl_c_after_a_drain_by_route_is_the_second_signal(numbers: tuple[int, ...], counted: int) -> None:
    frontend: Any = SupervisedFrontend(DrainRequest())
    supervisor = _Supervisor(frontend, ["true"], 0, 1e6)
    supervisor._listen(0.0)
    for number in numbers:
        supervisor.on_signal(number, None)
    assert len(supervisor.signals) == counted


def fails_before(job: int) -> list[str]:
    """A command whose jobs before this one fail at once, while this one runs until it is ended."""
    return ["sh", "-c", f"test ${launch.supervise.PLACE_VARIABLE} -lt {job} && exit 1; exec sleep 1000"]


@pytest.mark.parametrize("is_after", [False, True], ids=["before it runs", "before its process is known"])
@pytest.mark.parametrize("job", [1, 2])
def test_a_signal_at_the_start_of_a_job_is_not_lost(monkeypatch: pytest.MonkeyPatch, job: int, is_after: bool) -> None:
    frontend: Any = SupervisedFrontend()
    supervisor = _Supervisor(frontend, fails_before(job), 10, 1e6)

    def start_job(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if supervisor.job == job and not is_after:
            signal.raise_signal(signal.SIGUSR1)
        process = subprocess.Popen(*arguments, **options)
        if supervisor.job == job and is_after:
            signal.raise_signal(signal.SIGUSR1)
        return process

    monkeypatch.setattr(launch.supervise, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start_job}))
    handler = signal.signal(signal.SIGUSR1, supervisor.on_signal)
    try:
        assert supervisor.run() == 0
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert supervisor.job == job
    assert frontend.failure == ""


def test_a_signal_between_two_jobs_starts_no_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend: Any = SupervisedFrontend()
    supervisor = _Supervisor(frontend, fails_before(2), 10, 1e6)
    monkeypatch.setattr(frontend, "tell_phase", lambda _: supervisor.on_signal(signal.SIGUSR1, None))
    assert supervisor.run() == 0
    assert supervisor.job == 1


def status_of_a_launcher_that_forgets_a_signal(
    monkeypatch: pytest.MonkeyPatch, frontend: Any, launcher: list[str], kill_seconds: float
) -> int | None:
    """The signal comes while the ranks load; ``kill_seconds``: how long the launcher may still take. The supervisor ends well."""
    monkeypatch.setattr(launch.supervise, "KILL_SECONDS", kill_seconds)
    supervisor = _Supervisor(frontend, launcher, 10, 1e6)
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which the launcher inherits
    monkeypatch.setattr(frontend, "place", lambda job: supervisor.on_signal(signal.SIGUSR1, None) or str(job))
    try:
        assert supervisor.run() == 0
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert supervisor.process is not None
    return supervisor.process.returncode


def test_a_launcher_that_forgets_a_signal_is_killed_while_ranks_load(monkeypatch: pytest.MonkeyPatch) -> None:
    status = status_of_a_launcher_that_forgets_a_signal(monkeypatch, SupervisedFrontend(), ["sleep", "1000"], 0.1)
    assert status in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_signal_while_ranks_become_ready_drains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were told while they loaded: were the signal lost they would be killed, but they say that they drain."""
    frontend = SupervisedFrontend(FrontendReady(1), DrainRequest())
    assert status_of_a_launcher_that_forgets_a_signal(monkeypatch, frontend, ["sleep", "0.5"], 0.0) == 0
