"""Nothing is lost: results appear in order as they are done, an interrupted run keeps them, a later one continues."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from phalanx.launch import results
from phalanx.launch.gathering import Gathering
from phalanx.launch.results import InOrder, ResultFile
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.frames import frame
from phalanx.runtime.request import RequestOutput
from tests.support.launcher import LAUNCHER_ENVIRONMENT

from .commands import ROOT, command_line, messages, needs_mpirun, processes, run

PROMPTS = [{"prompt": f"def f{number}(", "max_tokens": 2 + number % 5} for number in range(12)]


def output(index: int) -> RequestOutput:
    return RequestOutput(index, (5, 6), (7,), None, "length")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


def test_a_result_is_written_as_soon_as_all_earlier_ones_are() -> None:
    written: list[int] = []
    in_order = InOrder(lambda one: written.append(one.index), [0, 2, 3, 5])
    seen = []
    for index in (2, 0, 5, 3):
        in_order.take(output(index))
        seen.append(list(written))
    assert seen == [[], [0, 2], [0, 2], [0, 2, 3, 5]]


def test_what_is_finished_is_written_although_earlier_ones_are_missing() -> None:
    written: list[int] = []
    in_order = InOrder(lambda one: written.append(one.index), range(4))
    in_order.take(output(3))
    in_order.take(output(1))
    in_order.release()
    assert written == [1, 3]


def test_a_line_that_was_cut_off_is_generated_again(tmp_path: Path) -> None:
    path = tmp_path / "results"
    file = ResultFile(path, resume=True)
    file.write(output(1))
    file.close(complete=False)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-5])
    again = ResultFile(path, resume=True)
    assert list(again.done) == [1]
    again.write(output(0))
    again.close(complete=True)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists; give --resume"):
        ResultFile(path, resume=False)
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match="line 1 is not a result"):
        ResultFile(path, resume=True)
    assert path.read_text() == "precious\n"


def test_a_device_or_a_pipe_takes_lines_as_they_come(tmp_path: Path) -> None:
    file = ResultFile(Path(os.devnull), resume=False)
    file.write(output(1))
    file.close(complete=True)
    with pytest.raises(ConfigError, match="not a file that --resume could continue"):
        ResultFile(Path(os.devnull), resume=True)
    os.mkfifo(pipe := tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        received = reader.submit(pipe.read_bytes)
        file = ResultFile(pipe, resume=False)
        file.write(output(1))
        file.close(complete=True)
    assert json.loads(received.result())["index"] == 1
    with pytest.raises(ConfigError, match="Is a directory"):
        ResultFile(tmp_path, resume=False)


@pytest.mark.parametrize("path", ["/dev/full/x", "/proc/results", "/nowhere/results"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(path: str) -> None:
    result = run("generate", "--model", "/nowhere", "--prompt", "a", "--output", path)
    assert result.returncode == 2
    assert len(messages(result.stderr)) == len(result.stderr.splitlines()) == 1
    assert f"--output {path} cannot be written" in result.stderr


@needs_mpirun
@pytest.mark.parametrize("dp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_was_interrupted_goes_on(prompts: Path, tmp_path: Path, dp: int) -> None:
    arguments = ("--log-level", "warning", "--input-file", prompts, "--dp", str(dp), "--output")
    assert run("generate", *arguments, tmp_path / "whole", ranks=2).returncode == 0
    whole = (tmp_path / "whole").read_text()
    lines = whole.splitlines(keepends=True)
    part = tmp_path / "part"
    part.write_text("".join(lines[:4] + lines[7:9]))
    result = run("generate", *arguments, part, "--resume", ranks=2)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert part.read_text() == whole
    other = run("generate", "--prompt", "other", "--output", part, "--resume", ranks=2)
    assert other.returncode == 2
    assert "continues other prompts" in other.stderr


@needs_mpirun
def test_a_run_of_replicas_that_is_killed_keeps_what_each_had_finished(tmp_path: Path) -> None:
    """Rank 0 has no time to ask the others: what they finish reaches it at once."""
    prompts, part = tmp_path / "prompts", tmp_path / "part"
    short, endless = ({"prompt": "a", "max_tokens": 2}, {"prompt": "a", "max_tokens": 2000, "ignore_eos": True})
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in [short] * 8 + [endless] * 40))
    words = command_line("generate", "--input-file", prompts, "--dp", "2", "--output", part, ranks=2)
    mark = f"PHALANX_TEST_JOB={uuid.uuid4().hex}"
    environment = {**os.environ, **LAUNCHER_ENVIRONMENT, **dict([mark.split("=")])}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as job:
        try:
            while not part.exists() or part.read_bytes().count(b"\n") < 8:
                assert job.poll() is None
        finally:
            job.kill()
    give_up = time.monotonic() + 60
    while left := processes(mark):
        assert time.monotonic() < give_up, left
    assert [json.loads(line)["index"] for line in part.read_text().splitlines()][:8] == list(range(8))


@needs_mpirun
@pytest.mark.parametrize("ranks", [0, 2])
def test_an_interrupted_run_keeps_what_it_finished(tmp_path: Path, ranks: int) -> None:
    """The second prompt is done long before the first."""
    prompts = tmp_path / "prompts"
    long = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
    prompts.write_text(
        json.dumps(long)
        + "\n"
        + json.dumps({"prompt": "b", "max_tokens": 2})
        + "\n"
        + json.dumps({"prompt": "c", "max_tokens": 2})
        + "\n"
    )
    watcher = tmp_path / "watch.py"
    watcher.write_text(WATCHER)
    command = command_line("generate", "--input-file", prompts, "--output", tmp_path / "results", ranks=ranks)
    command[command.index("-m") : command.index("launch.generate") + 1] = [str(watcher)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(json.loads(line)["index"] for line in (tmp_path / "results").read_text().splitlines()) == [1, 2]


WATCHER = """
import os, signal, sys, launch
from phalanx.launch import generate
from phalanx.launch.running import run_command
from phalanx.parallel.launcher import launch_info
import phalanx.launch.results as results

taken = []
take = results.InOrder.take

def watch(self, output):
    take(self, output)
    taken.append(output.index)
    if len(taken) == 2:
        os.kill(os.getpid(), signal.SIGTERM)

results.InOrder.take = watch
run_command(generate.main, sys.argv[1:])
"""


@needs_mpirun
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_prompts_without_an_answer_are_counted_in_one_line_next_to_status_2(tmp_path: Path, ranks: int) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    file.write_text('{"prompt_token_ids": [5], "max_tokens": 1}\n' + '{"prompt_token_ids": [999999]}\n' * 2)
    layout = ("--log-level", "warning", *(("--dp", "2") if ranks else ()))  # no progress on a slow machine
    expected = 'phalanx: 2 of 3 prompt(s) have no answer, and "error" says why; the first is prompt 1: prompt token 0 is 999999'
    for again in ((), ("--resume",)):
        result = run("generate", "--input-file", file, "--output", output, *layout, *again, ranks=ranks)
        assert result.returncode == 2
        assert [line.startswith(expected) for line in messages(result.stderr)] == [True], result.stderr


def test_a_full_disk_is_one_line_and_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command_line("generate", "--prompt", "a", "--max-tokens", "2"),
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be written: No space left on device" in result.stderr.splitlines()[0]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    file = ResultFile(path, resume=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"results\.jsonl"):
            file.write(output(0))
        with pytest.raises(OSError, match=r"results\.jsonl"):
            file.close(complete=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_another_run_writes_is_refused(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LOCK_SECONDS", 0.0)
    path = tmp_path / "results.jsonl"
    first = ResultFile(path, resume)
    with pytest.raises(ConfigError, match="is being written by another run; wait for its end"):
        ResultFile(path, resume=True)
    first.close(complete=False)
    ResultFile(path, resume=True).close(complete=False)


def test_a_run_that_waited_for_another_continues_what_that_has_put_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    first = ResultFile(path, resume=True)
    first.write(output(1))
    first.write(output(0))
    ending = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: first.close(complete=True))
    monkeypatch.setattr(results, "time", ending)
    second = ResultFile(path, resume=True)
    assert sorted(second.done) == [0, 1]
    second.write(output(2))
    second.close(complete=True)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_file_that_another_run_wrote_while_this_one_waited_is_not_continued_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(ResultFile, "_lock", lambda *_: path.write_text("another run's\n"))
    with pytest.raises(ConfigError, match="exists; give --resume"):
        ResultFile(path, resume=False)
    assert path.read_text() == "another run's\n"


class LateLock:
    """A lock before which something else happens once."""

    def __init__(self, before: Callable[[], None]) -> None:
        self._lock, self._before = threading.Lock(), [before]

    def __enter__(self) -> None:
        if self._before:
            self._before.pop()()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_result_whose_writing_failed_while_the_same_waited_for_its_turn_is_an_error() -> None:
    def full(_: RequestOutput) -> None:
        raise OSError("planted: disk full")

    nowhere: Any = None
    gathering = Gathering(nowhere, 1, full)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(frame(msgspec.msgpack.encode(output(0))))
    late: Any = LateLock(lambda: gathering._receive(ours))
    gathering._lock = late
    with pytest.raises(OSError, match="planted"):
        gathering.take_shared(output(0))


@pytest.mark.parametrize("command", [("plan",), ("generate", "--prompt", "a", "--max-tokens", "2")])
def test_a_closed_pipe_is_no_traceback(command: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", f"launch.{command[0]}", *command[1:]],
        cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--logprobs", "2"), "--logprobs is only printed with --json or --output"),
        (("--stream", "--json"), "--stream prints text and --json prints results"),
        (("--stream", "--prompt", "b"), "--stream shows one prompt, there are 2"),
        (("--resume",), "--resume continues a file; name it with --output"),
    ],
)
def test_flags_without_effect_are_refused(flags: tuple[str, ...], said: str) -> None:
    result = run("generate", "--prompt", "a", *flags)
    assert result.returncode == 2
    assert said in result.stderr


def test_the_file_behind_standard_output_takes_lines_after_what_it_holds(tmp_path: Path) -> None:
    command = "import sys; from pathlib import Path; from phalanx.launch.results import ResultFile; ResultFile(Path('/dev/stdout'), False).close(complete=True)"
    kept = tmp_path / "results.jsonl"
    kept.write_text("before\n")
    with kept.open("a") as file:
        subprocess.run([sys.executable, "-c", command], stdout=file, check=True)
    assert kept.read_text() == "before\n"
