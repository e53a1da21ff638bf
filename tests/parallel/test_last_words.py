"""What a job says when it ends is limited in time, and in no way of saying it can it fail."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from phalanx.parallel.errors import printable
from phalanx.parallel.liveness import last_words
from phalanx.parallel.liveness.last_words import keep_report, say, within

NOT_UTF_8 = "model-\udcff"
"""A file's name as Python has it."""


def test_work_that_does_not_end_is_not_waited_for() -> None:
    never = threading.Event()
    within(0.01, lambda: bool(never.wait()))
    never.set()


def test_work_is_done_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    within(1.0, lambda: done.append(1))
    assert done == [1]


def test_a_file_server_that_does_not_answer_does_not_keep_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()
    monkeypatch.setattr(last_words, "_keep", lambda *_: str(never.wait()))
    monkeypatch.setattr(last_words, "KEEP_SECONDS", 0.01)
    assert keep_report(tmp_path, "verdict") == [f"phalanx: the report could not be kept in {tmp_path} within 0.01 s"]
    never.set()


def test_names_that_are_not_utf_8_are_written_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (line,) = keep_report(tmp_path, NOT_UTF_8)
    assert Path(line.rpartition(" ")[2]).read_bytes() == b"model-\\udcff\n"
    say(NOT_UTF_8)
    assert capfd.readouterr().err == "model-\\udcff\n"
    assert printable(NOT_UTF_8) == "model-\\udcff"
    assert printable("Gemäß 日本") == "Gemäß 日本"
