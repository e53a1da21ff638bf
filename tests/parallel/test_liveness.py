"""Verdicts about ranks, and links between them: pure, or over threads."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.connections import connect_ranks
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.liveness.judge import Limits, RankState, report, silent_rank, stalled_rank, trouble
from phalanx.parallel.liveness.known_ranks import KnownRanks
from phalanx.parallel.liveness.links import Link, Links
from phalanx.parallel.liveness.messages import Leaving, encode
from phalanx.parallel.liveness.progress import RankProgress, Stamp
from phalanx.parallel.liveness.watch import RankWatch
from phalanx.parallel.liveness.watched_comm import WatchedCommunicator
from phalanx.parallel.thread_comm import run_ranks

LIMITS = Limits(step=20.0, start=100.0, silence=10.0)


def states(*stamps: Stamp) -> list[RankState]:
    return [RankState(rank, f"m{rank}, pid {rank}", stamp) for rank, stamp in enumerate(stamps)]


def stepping(step: int = 5, collective: str = "", seconds: float = 0.0) -> Stamp:
    return Stamp("stepping", "executing steps", step, collective, 7, seconds)


def test_a_rank_that_is_silent_beyond_the_limit_is_named() -> None:
    ranks = states(Stamp("waiting"), Stamp("waiting"))
    ranks[1].silent = 9.9
    assert silent_rank(ranks, LIMITS) is None
    ranks[1].silent = 10.1
    assert "rank 1 (m1, pid 1) has given no sign of life" in (silent_rank(ranks, LIMITS) or "")


def test_while_ranks_load_silence_may_last_as_long_as_a_step() -> None:
    ranks = states(Stamp(), Stamp())
    ranks[1].silent = 19.0
    assert silent_rank(ranks, LIMITS) is None
    ranks[1].silent = 21.0
    assert silent_rank(ranks, LIMITS) is not None


def test_an_idle_job_never_stalls_and_a_busy_one_does() -> None:
    assert stalled_rank(states(Stamp("waiting", seconds=1e6)), LIMITS) is None
    assert stalled_rank(states(stepping(seconds=19.0)), LIMITS) is None
    assert "no step has ended for 21 s" in (stalled_rank(states(stepping(seconds=21.0)), LIMITS) or "")


def test_a_start_that_does_not_end_names_the_rank_and_its_phase() -> None:
    verdict = stalled_rank(states(Stamp("waiting"), Stamp("starting", "loading weights", seconds=101.0)), LIMITS)
    assert verdict is not None
    assert "rank 1 (m1, pid 1) has been loading weights for 101 s" in verdict


def test_in_a_stall_the_rank_outside_the_collective_is_the_one_waited_for() -> None:
    inside = stepping(collective="all_reduce", seconds=21.0)
    assert "wait for rank 1 (m1, pid 1)" in (stalled_rank(states(inside, stepping(), inside), LIMITS) or "")
    assert "wait for rank 2 (m2, pid 2)" in (stalled_rank(states(inside, inside, stepping(step=4)), LIMITS) or "")
    assert "a device or the network" in (stalled_rank(states(inside, inside), LIMITS) or "")


def test_a_rank_that_left_while_another_computes_is_named_and_otherwise_may_leave() -> None:
    ranks = states(stepping(), Stamp("waiting"))
    ranks[1].left = 6.0
    assert "rank 1 (m1, pid 1) has left while rank 0 is executing steps" in (silent_rank(ranks, LIMITS) or "")
    ranks[0].stamp = Stamp("waiting")
    assert silent_rank(ranks, LIMITS) is None


def test_health_is_in_trouble_before_the_limit() -> None:
    ranks = states(Stamp("waiting"), Stamp("waiting"))
    assert trouble(ranks) is None
    ranks[1].silent = 3.1
    assert "rank 1" in (trouble(ranks) or "")


def test_a_report_has_every_rank_and_its_last_lines() -> None:
    ranks = states(stepping(collective="all_reduce"), stepping())
    ranks[1].stacks = "File a.py, line 1"
    lines = report("it ends", ranks).splitlines()
    assert lines[0] == "it ends"
    assert lines[1].startswith("  rank 0 (m0, pid 0): executing steps, step 5, in all_reduce (collective 7)")
    assert lines[-1] == "    | File a.py, line 1"


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9, float("nan")])
def test_a_limit_out_of_range_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--stall-timeout"):
        Limits(step=seconds)


def test_progress_counts_the_limit_from_the_last_step_that_ended() -> None:
    now = [0.0]
    progress = RankProgress(lambda: now[0])
    progress.wait()
    now[0] = 100.0
    progress.begin_step(0)
    now[0] = 103.0
    progress.begin_step(1)
    assert (progress.stamp().step, progress.stamp().seconds) == (1, 3.0)
    progress.end_step(num_in_flight=1)
    now[0] = 104.0
    assert (progress.stamp().activity, progress.stamp().seconds) == ("stepping", 1.0)
    progress.end_step(num_in_flight=0)
    assert progress.stamp().activity == "waiting"


@pytest.mark.parametrize("late", [0.0, 400.0], ids=["stuck", "suspended"])
@pytest.mark.parametrize("activity", ["starting", "stepping"])
def test_time_in_which_the_whole_job_was_suspended_does_not_count(
    activity: str, late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm suspends all processes of a job. The thread that watches finds that it is late itself, and judges at the next tick."""
    now, verdicts = [0.0], list[str]()
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    progress = RankProgress(lambda: now[0])
    watch = RankWatch(SelfCommunicator(), progress, Limits(step=300.0, start=300.0))
    monkeypatch.setattr(watch._end, "by_verdict", verdicts.append)
    if activity == "stepping":
        progress.begin_step(0)
    now[0] = 400.5
    watch._tick(late)
    watch._tick(0.0)
    assert bool(verdicts) == (late == 0.0)
    now[0] = 702.0
    watch._tick(0.0)
    assert verdicts, "from then on the limit counts as ever"


def test_an_error_says_in_which_phase_it_was_raised() -> None:
    progress = RankProgress()

    def fail() -> None:
        with progress.phase("loading weights"):
            raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        fail()
    assert caught.value.__notes__ == ["while loading weights"]
    assert progress.stamp().phase == "loading weights", "the last stamp of a rank that fails says where"


def test_every_rank_is_linked_to_rank_0_and_collectives_are_counted() -> None:
    def body(comm: Communicator) -> tuple[list[int], int]:
        progress = RankProgress()
        sockets, reason = connect_ranks(WatchedCommunicator(comm, progress))
        assert reason is None
        links = {rank: Link(rank, sock) for rank, sock in sockets.items()}
        for link in links.values():
            link.send(Leaving())
        comm.barrier()
        assert all(link.receive() == [Leaving()] for link in links.values())
        for link in links.values():
            link.close()
        return sorted(links), progress.num_collectives

    results = run_ranks(3, body)
    assert [links for links, _ in results] == [[1, 2], [0], [0]]
    assert len({count for _, count in results}) == 1


def test_a_connection_that_has_ended_keeps_no_other_from_being_flushed() -> None:
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    links = Links({rank: own for rank, (own, _) in pairs.items()})
    pairs[1][1].close()
    links.send_all(Leaving())
    links.flush(10.0)
    assert pairs[2][1].recv(1 << 10) == encode(Leaving())
    for one, other in pairs.values():
        one.close()
        other.close()


def test_silence_that_is_forgiven_is_never_negative_and_retired_ranks_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a suspension, stamps that waited to be read are heard before the time is forgiven."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ranks = KnownRanks(0, {0: "a", 1: "b", 2: "c"}, RankProgress(lambda: now[0]))
    now[0] = 3600.0
    ranks.hear(1, Leaving())
    ranks.forgive(3600.0)
    assert [state.silent for state in ranks.states()] == [0.0, 0.0, 0.0]
    ranks.leave(2)
    ranks.retire([2])
    assert [state.rank for state in ranks.states()] == [0, 1]
