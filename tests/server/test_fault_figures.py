"""How long faults take to be told and cleaned up: ``make fault-figures`` prints a table, with the bounds that it must keep.

``PHALANX_FAULT_ROUNDS`` says how often each fault is repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job, is_open_mpi, serve
from .test_lifecycle import events
from .test_serve import CONFIG, LONG, assert_one_line, serve_tiny, tiny
from .test_supervise import supervised
from .test_unusual_faults import EXECUTORS, FAULTY

__all__ = ["tiny"]

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("PHALANX_FAULT_ROUNDS", "5"))
PATH = "/v1/completions"
NUM_STREAMS = 32
TOLD, GONE = "clients told", "processes gone"
LOADING = """
def fail(*_, **__):
    if launch_info().rank == {rank}:
        {fault}
    return build_replica(*_, **__)

import phalanx.runtime.replica as replica
build_replica, replica.build_replica = replica.build_replica, fail
"""
Figure = dict[str, float]
"""Seconds by what they measure."""


class Figures:
    """The longest of each fault's rounds."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[Figure]] = {}

    def add(self, fault: str, bounds: Figure, measured: Figure) -> None:
        self.rounds.setdefault(fault, []).append(measured)
        load = f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} processors"
        assert all(measured[name] <= bound for name, bound in bounds.items()), (measured, bounds, load)

    def table(self) -> list[str]:
        lines = ["| fault | rounds | longest, s |", "|---|---|---|"]
        for fault, rounds in self.rounds.items():
            longest = {name: max(round_[name] for round_ in rounds) for name in rounds[0]}
            lines.append(f"| {fault} | {len(rounds)} | {', '.join(f'{name} {s:.2f}' for name, s in longest.items())} |")
        return lines


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    collected = Figures()
    yield collected
    capture = request.config.pluginmanager.getplugin("capturemanager")
    lines = ["", f"{'Open MPI' if is_open_mpi() else 'MPICH'}, {time.strftime('%Y-%m-%d')}", *collected.table()]
    with capture.global_and_fixture_disabled():
        print("\n".join(lines))


@pytest.fixture(autouse=True)
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))


def repeated(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("round_", range(ROUNDS))(test)


def seconds_until_told_and_gone(job: Job, fault: Callable[[], object]) -> Figure:
    """Let the fault happen under streams, each of which must end with one well-formed error."""
    streams = [job.server.open_stream(PATH, LONG) for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        started = time.monotonic()
        fault()
        ends = list(pool.map(events, streams))
        told = time.monotonic() - started
    assert all(end[-1]["error"]["code"] == "engine_failed" for end in ends)
    assert job.server.wait()[0] != 0
    job.seconds_until_gone()
    return {TOLD: told, GONE: time.monotonic() - started}


@repeated
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_is_killed(tiny: Path, figures: Figures, rank: int, round_: int) -> None:
    with serve_tiny(tiny) as job:
        measured = seconds_until_told_and_gone(job, lambda: os.kill(job.rank(rank), signal.SIGKILL))
    figures.add(f"1. SIGKILL of rank {rank} of 4", {TOLD: 5, GONE: 10}, measured)


@repeated
def test_a_replica_is_killed_under_ulfm(tiny: Path, figures: Figures, round_: int) -> None:
    if not is_open_mpi():
        pytest.skip("ULFM is Open MPI's")
    with serve_tiny(tiny, 4, "--dp", "2", "--pp", "1", launcher_flags=("--with-ft", "ulfm")) as job:
        body = {**LONG, "max_tokens": 300, "temperature": 0}
        streams = [job.server.open_stream(PATH, body) for _ in range(2)]
        started = time.monotonic()
        os.kill(job.rank(2), signal.SIGKILL)
        whole, broken = sorted(map(events, streams), key=lambda end: "error" in end[-1])
        assert "replica 1 was lost" in broken[-1]["error"]["message"]
        assert job.server.post(PATH, {"prompt": "a", "max_tokens": 3}).status == 200
        served = time.monotonic() - started
        assert text(whole) == text(events(job.server.open_stream(PATH, body)))
        os.kill(job.rank(0), signal.SIGUSR1)
        assert job.server.wait()[0] == 0
    figures.add(
        "2. SIGKILL of a rank of replica 1 of 2, ULFM",
        {"a new request answered": 5},
        {"a new request answered": served},
    )


def text(stream: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in stream)


@repeated
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("when", ["while ranks load", "in a prefill", "in a decoding step"])
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("an exception", "raise ZeroDivisionError('planted')"),
        ("sys.exit", "sys.exit(3)"),
        ("an assertion", "assert False, 'planted'"),
    ],
)
def test_a_rank_fails(
    tiny: Path, tmp_path: Path, figures: Figures, name: str, fault: str, when: str, rank: int, round_: int
) -> None:
    fault = f"os.write(2, b'FAULT\\n'); {fault}"
    if when == "while ranks load":
        text = faulty({}).replace("run_command(", LOADING.format(rank=rank, fault=fault) + "run_command(")
    else:
        text = faulty({rank: in_step(1 if when == "in a prefill" else 20, fault)})
    with serve_program(tiny, tmp_path, text, 4, "--pp", "2", wait_for="") as job:
        if when != "while ranks load":
            job.server.wait_for("READY")
            connection = job.server.connect()
            connection.request("POST", PATH, json.dumps(LONG))
        job.server.wait_for("FAULT")
        measured = end_of(job, time.monotonic())
        if when != "while ranks load":
            assert connection.getresponse().status == 500
    figures.add(f"3. {name} {when}", {GONE: 5}, measured)


def faulty(faults: dict[int, str]) -> str:
    """A program whose ranks do this in every step."""
    return FAULTY.format(executors=EXECUTORS["numpy"], trigger=os.sep, faults=faults, background={})


def in_step(number: int, fault: str) -> str:
    return f"self.steps = getattr(self, 'steps', 0) + 1\nif self.steps == {number}: {fault}"


def end_of(job: Job, started: float) -> Figure:
    assert job.server.wait()[0] != 0
    job.seconds_until_gone()
    return {GONE: time.monotonic() - started}


@contextlib.contextmanager
def serve_program(
    model: Path, directory: Path, text: str, num_ranks: int, *flags: str, wait_for: str = "READY"
) -> Iterator[Job]:
    """``launch.serve`` as this program runs it."""
    script = directory / "launch.serve.py"  # by which a job finds its ranks
    script.write_text(text)
    model_flags = ("--model", str(model), "--load-format", "dummy")
    with serve(num_ranks, *model_flags, *flags, program=(script,), wait_for=wait_for) as job:
        yield job


@repeated
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_is_stopped(tiny: Path, figures: Figures, rank: int, round_: int) -> None:
    with serve_tiny(tiny, 4, "--stall-timeout", "5") as job:
        measured = seconds_until_told_and_gone(job, lambda: os.kill(job.rank(rank), signal.SIGSTOP))
    figures.add(f"4. SIGSTOP of rank {rank} of 4, --stall-timeout 5", {GONE: 15}, measured)


@repeated
@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_a_forward_pass_fails_after_ten(
    tiny: Path, tmp_path: Path, figures: Figures, tp: int, rank: int, round_: int
) -> None:
    model = tmp_path / "wide"
    shutil.copytree(tiny, model)
    (model / "config.json").write_text(
        json.dumps(CONFIG | {"intermediate_size": 64})
    )  # whose units four ranks can share
    text = faulty({rank: in_step(11, "os.write(2, b'FAULT\\n'); raise ValueError('planted')")})
    with serve_program(model, tmp_path, text, tp, "--tp", str(tp)) as job, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(job.server.post, PATH, LONG) for _ in range(3)]
        job.server.wait_for("FAULT")
        started = time.monotonic()  # not before: ten passes take as long as the machine is slow
        assert {answer.result().status for answer in answers} <= {500, 503}
        told = time.monotonic() - started
        measured = {TOLD: told, **end_of(job, started)}
    figures.add(f"5. an error after 10 good passes, rank {rank} of tp {tp}", {GONE: 10}, measured)


@repeated
@pytest.mark.parametrize("victim", ["mpirun", "the HTTP process"])
def test_the_launcher_or_the_http_process_is_killed(tiny: Path, figures: Figures, victim: str, round_: int) -> None:
    with serve_tiny(tiny) as job:
        stream = job.server.open_stream(PATH, LONG)
        started = time.monotonic()
        os.kill(job.server.process.pid if victim == "mpirun" else job.http_process(), signal.SIGKILL)
        measured = end_of(job, started)
        stream.close()
    figures.add(f"6. SIGKILL of {victim}", {GONE: 10}, measured)


@repeated
def test_a_drain_answers_everything(tiny: Path, figures: Figures, round_: int) -> None:
    with serve_tiny(tiny, 4, "--shutdown-timeout", "300") as job:  # this is about answers, however slow the machine
        streams = [job.server.open_stream(PATH, LONG | {"max_tokens": 200}) for _ in range(10)]
        started = time.monotonic()
        job.server.process.send_signal(signal.SIGUSR1)
        while (refused := job.server.post(PATH, {"prompt": "a", "max_tokens": 1})).status == 200:
            continue
        assert (refused.status, "retry-after" in refused.headers) == (503, True)
        assert all(events(stream)[-1]["choices"][0]["finish_reason"] == "length" for stream in streams)
        assert job.server.wait()[0] == 0
    figures.add("7. drain of 10 streams of 200 tokens", {}, {"exit 0 after": time.monotonic() - started})


@repeated
def test_a_second_signal_does_not_wait(tiny: Path, figures: Figures, round_: int) -> None:
    with serve_tiny(tiny) as job:
        stream = job.server.open_stream(PATH, LONG | {"n": 8})
        os.kill(job.rank(0), signal.SIGTERM)
        job.server.lines_with("draining")
        started = time.monotonic()
        os.kill(job.rank(0), signal.SIGTERM)
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
        measured = end_of(job, started)
    figures.add("7. a second signal", {GONE: 4.1}, measured)


@repeated
def test_a_supervised_server_is_ready_again(tiny: Path, figures: Figures, round_: int) -> None:
    with supervised(tiny, 4, "--tp", "2", "--pp", "2") as job:
        started = time.monotonic()
        os.kill(job.rank(3), signal.SIGKILL)
        assert job.server.lines_with("READY again")
        measured = {"READY again": time.monotonic() - started}
        os.kill(job.server.process.pid, signal.SIGTERM)
        assert job.server.wait()[0] == 0
    figures.add("9. SIGKILL of a rank under --supervise", {}, measured)


@repeated
def test_the_port_answers_at_once(tiny: Path, figures: Figures, round_: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = time.monotonic()
    with serve_tiny(tiny, 4, "--port", str(port), wait_for="") as job:
        job.server.url = f"http://127.0.0.1:{port}"
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/nothing"):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    assert job.server.get(path).status == 503
                    break
        answered = time.monotonic() - started
        job.server.wait_for("READY")
        ready = time.monotonic() - started
    figures.add("8. start of 4 ranks", {}, {"503 on every route": answered, "READY": ready})


@repeated
def test_a_broken_checkpoint_ends_the_start(tiny: Path, tmp_path: Path, figures: Figures, round_: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    started = time.monotonic()
    with serve(4, "--model", str(broken), "--tp", "2", "--pp", "2", wait_for="") as job:
        measured = end_of(job, started)
        assert_one_line(job.server.wait()[1], "model.safetensors")
    figures.add("8. a broken checkpoint", {GONE: 10}, measured)
