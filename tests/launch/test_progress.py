"""Progress on a terminal and elsewhere, with a clock of the test's."""

from __future__ import annotations

import io
import json

import pytest

from phalanx.launch.loading import start_progress
from phalanx.launch.progress import Progress
from phalanx.parallel.liveness.progress import RankProgress
from phalanx.runtime.logs import configure


@pytest.fixture(autouse=True)
def shown() -> None:
    configure("info", "text")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def advance(seconds: list[float], total: int | None) -> None:
    """One of ``total`` pieces is done at each of these seconds."""
    now = [0.0]
    with Progress("loading", total, "tensors", stream=io.StringIO(), clock=lambda: now[0]) as progress:
        for second in seconds:
            now[0] = second
            progress.advance()


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    advance([0.1 * step for step in range(40)], 40)
    assert capsys.readouterr().err == ""


def test_a_line_every_tenth_part(capsys: pytest.CaptureFixture[str]) -> None:
    advance([10.0 + step for step in range(100)], 100)
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 10
    assert found[1] == "phalanx: loading: 11 of 100 tensors (11 %), 20 s"


def test_a_line_every_ten_seconds_where_there_is_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    advance([float(step) for step in range(1, 32)], None)
    assert capsys.readouterr().err.splitlines() == [
        "phalanx: loading: 10 tensors, 10 s", "phalanx: loading: 20 tensors, 20 s", "phalanx: loading: 30 tensors, 30 s",
    ]  # fmt: skip


def test_other_ranks_are_silent() -> None:
    stream = Terminal()
    with Progress("loading", 3, "tensors", shown=False, stream=stream) as progress:
        progress.advance(3)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("loading", 3, "tensors", stream=stream) as progress:
        progress.advance(2)
    assert "loading" in stream.getvalue()
    assert "2/3" in stream.getvalue()


def test_a_phase_without_parts_says_how_long_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Progress("starting", None, "weights", stream=io.StringIO(), clock=lambda: now[0]) as progress:
        now[0] = 12.0
        progress.show(0, None, "comparing ranks")
    assert capsys.readouterr().err == "phalanx: comparing ranks, 12 s\n"


def test_log_level_warning_silences_lines_and_bar(capsys: pytest.CaptureFixture[str]) -> None:
    configure("warning", "text")
    advance([10.0 + step for step in range(100)], 100)
    stream = Terminal()
    with Progress("loading", 3, "tensors", stream=stream) as progress:
        progress.advance(2)
    assert (stream.getvalue(), capsys.readouterr().err) == ("", "")


def test_machines_get_objects_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    advance([20.0], 100)
    stream = Terminal()
    with Progress("loading", 3, "tensors", stream=stream) as progress:
        progress.advance(2)
    line = json.loads(capsys.readouterr().err)
    assert {"work": "loading", "done": 1, "total": 100, "unit": "tensors", "level": "info"}.items() <= line.items()
    assert stream.getvalue() == ""


def test_a_start_is_told_phase_by_phase_and_whole_percent() -> None:
    told: list[str] = []
    progress = RankProgress()
    with start_progress(False, told.append) as on_phase, progress.reporting(on_phase):
        with progress.phase("opening the checkpoint"):
            pass
        with progress.phase("loading weights"):
            for done in range(1, 401):
                progress.advance(done, 400)
    with progress.phase("serving"):
        pass
    assert told[:3] == ["opening the checkpoint", "loading weights", "loading weights, 0 %"]
    assert len(told) == 2 + 101
    assert told[-1] == "loading weights, 100 %"
