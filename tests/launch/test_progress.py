"""Progress on a terminal and elsewhere, with a clock of the test's."""

from __future__ import annotations

import io

from phalanx.launch.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(seconds: list[float], total: int | None) -> list[str]:
    """What is written when one of ``total`` pieces is done at each of these seconds."""
    now = [0.0]
    stream = io.StringIO()
    with Progress("loading", total, "tensors", stream=stream, clock=lambda: now[0]) as progress:
        for second in seconds:
            now[0] = second
            progress.advance()
    return stream.getvalue().splitlines()


def test_short_work_says_nothing() -> None:
    assert lines([0.1 * step for step in range(40)], 40) == []


def test_a_line_every_tenth_part() -> None:
    found = lines([10.0 + step for step in range(100)], 100)
    assert len(found) == 10
    assert found[1] == "phalanx: loading: 11 of 100 tensors (11 %), 20 s"


def test_a_line_every_ten_seconds_where_there_is_no_end() -> None:
    assert lines([float(step) for step in range(1, 32)], None) == [
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
