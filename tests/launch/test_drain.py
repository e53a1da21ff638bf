"""Signals to rank 0 of a server: which one drains, and which one does not wait any more."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from phalanx.launch.drain import DRAIN_SIGNALS, DrainSignals
from phalanx.launch.signals import leave_signals_alone

TERM, HUP, USR1 = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


class Ends:
    """What a watch was told, in place of one: the status and after how many seconds."""

    def __init__(self) -> None:
        self.told: list[tuple[float, int]] = []

    def end_by(self, seconds: float, status: int, reason: str) -> None:
        self.told.append((seconds, status))


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of the tests' own process, put back."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in DRAIN_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def after(*numbers: int, is_supervised: bool, is_ready: bool = True) -> tuple[list[tuple[float, int]], int]:
    """What the watch was told, and how often a drain was begun."""
    ends, drains = Ends(), list[int]()
    watch: Any = ends
    signals = DrainSignals(watch, 25.0, is_supervised=is_supervised)
    signals.catch()
    if is_ready:
        signals.on_drain(lambda: drains.append(1))
    for number in numbers:
        signal.raise_signal(number)
    return ends.told, len(drains)


@pytest.mark.parametrize("first", [TERM, HUP, USR1])
@pytest.mark.parametrize("second", [TERM, HUP, USR1])
def test_a_second_signal_of_either_kind_does_not_wait(first: int, second: int) -> None:
    assert after(first, is_supervised=False) == ([(25.0, 1)], 1)
    assert after(first, second, is_supervised=False) == ([(25.0, 1), (0.0, 128 + second)], 1)


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    assert after(HUP, is_supervised=False) == ([], 0)
    leave_signals_alone()
    assert signal.getsignal(HUP) == signal.SIG_IGN


@pytest.mark.parametrize("numbers", [(TERM, USR1), (USR1, TERM), (TERM, TERM, USR1, TERM)])
def test_under_a_supervisor_sigterm_is_the_same_request_as_the_signal_that_is_passed_on(
    numbers: tuple[int, ...],
) -> None:
    assert after(*numbers, is_supervised=True) == ([(25.0, 1)], 1)


def test_under_a_supervisor_a_second_signal_that_is_passed_on_does_not_wait() -> None:
    assert after(TERM, USR1, TERM, USR1, is_supervised=True) == ([(25.0, 1), (0.0, 128 + USR1)], 1)


@pytest.mark.parametrize("is_supervised", [False, True])
def test_a_signal_while_ranks_load_ends_them(is_supervised: bool) -> None:
    assert after(TERM, is_supervised=is_supervised, is_ready=False) == ([(0.0, 0)], 0)


@pytest.mark.parametrize("between", [[], [TERM]])
def test_ctrl_c_after_a_drain_by_route_does_not_wait(between: list[int]) -> None:
    watch: Any = Ends()
    signals = DrainSignals(watch, 25.0)
    signals.catch()
    signals.on_drain(lambda: None)
    signals.drain()
    for number in between:
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_draining_is_said_once_however_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    for asks in (("route", "signal", "route"), ("signal", "route")):
        watch: Any = Ends()
        signals = DrainSignals(watch, 25.0)
        signals.catch()
        signals.on_drain(lambda: None)
        for way in asks:
            if way == "route":
                signals.drain()
            else:
                signal.raise_signal(TERM)
        assert capfd.readouterr().err.count("draining: ") == 1


def test_a_drain_by_route_is_not_a_signal() -> None:
    watch: Any = Ends()
    signals = DrainSignals(watch, 25.0)
    signals.catch()
    signals.on_drain(lambda: None)
    signals.drain()
    signals.drain()
    assert watch.told == [(25.0, 1)]
    signal.raise_signal(TERM)
    assert watch.told == [(25.0, 1)], "the same request by another way, as Kubernetes makes it after a preStop hook"
    signal.raise_signal(TERM)
    assert watch.told == [(25.0, 1), (0.0, 128 + TERM)]
