# SPDX-License-Identifier: Apache-2.0
"""The thread that watches: stamps to rank 0 twice a second, and the end of the job when a rank is lost or stuck.

A process that ends closes its connections at once, whatever ended it; one that is stopped, or whose host or network is
gone, falls silent. Neither MPI nor launchers promise to notice either: under ``srun --mpi=pmi2`` a dead rank takes 30 s.
The thread calls nothing of MPI and ends the process by itself, because the main thread may be in a collective that
never returns.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.connections import connect_ranks
from phalanx.parallel.errors import (
    CheckpointError,
    CommunicatorError,
    ConfigError,
    EndedElsewhereError,
    RequestError,
    printable,
)
from phalanx.parallel.lateness import Lateness
from phalanx.parallel.liveness import ending, judge
from phalanx.parallel.liveness.ending import FAILED, JobEnd, own_stacks
from phalanx.parallel.liveness.hydra import HeldRanks
from phalanx.parallel.liveness.judge import Limits, RankState
from phalanx.parallel.liveness.known_ranks import KnownRanks
from phalanx.parallel.liveness.last_words import say
from phalanx.parallel.liveness.links import Link, Links
from phalanx.parallel.liveness.messages import End, Failure, Leaving, Message, Retire, StackRequest, Stacks, Verdict
from phalanx.parallel.liveness.progress import STAMP_SECONDS, RankProgress

__all__ = ["RankWatch"]

_ENDED_ELSEWHERE = (ConfigError, CheckpointError, RequestError, EndedElsewhereError, KeyboardInterrupt)
"""Most such mistakes are found by every rank, and an interrupt is not a failure: `launch.running` ends the job if need be."""
_COMMUNICATION_MODULES = ("mpi4py.", "cupy_backends.cuda.libs.nccl")
"""Whose exceptions mean, as `CommunicatorError` does, that another rank is out of reach."""


class RankWatch:
    """Watches from construction (*collective*) until `close`, or as a context around everything that ranks do together.

    Args:
        world: all ranks, raw: the watch's own collectives do not show in stamps.
        progress: what this rank is doing.
        on_failure: on rank 0, told the verdict before the process ends; runs in a thread of its own.
        on_trouble: on rank 0, told when a rank falls silent, and None when all answer again; runs in the watching thread.
        report_directory: where the whole report is kept as a file; None = nowhere.
        on_stamp: called twice a second, in the same thread: this process runs.
    """

    def __init__(
        self,
        world: Communicator,
        progress: RankProgress,
        limits: Limits,
        on_failure: Callable[[str], None] = lambda _: None,
        on_trouble: Callable[[str | None], None] = lambda _: None,
        report_directory: Path | None = None,
        on_stamp: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank, self._progress, self._limits = world.rank, progress, limits
        self._on_trouble, self._on_stamp = on_trouble, on_stamp
        names = [name.decode() for name in gather_bytes(world, f"{socket.gethostname()}, pid {os.getpid()}".encode())]
        sockets, reason = connect_ranks(world)
        self._held = HeldRanks.exchange(world, sockets)
        self._links = Links(sockets)
        if reason is not None and world.rank == 0:
            say(f"phalanx: ranks do not watch each other: {reason}; a lost rank is noticed by the launcher alone")
        self._ranks = KnownRanks(world.rank, {rank: names[rank] for rank in (world.rank, *sockets)}, progress)
        self._end = JobEnd(world.rank, self._links, self._ranks, self._held, on_failure, report_directory)
        self._closing = self._failure_told = False
        self._effects: list[tuple[float, RankState, Failure]] = []
        self._trouble: str | None = None
        self._end_at: tuple[float, int, str] | None = None
        self._forgiven = 0.0
        self._spare: Sequence[range] = ()
        self._on_loss: Callable[[range, str], None] = lambda _, __: None
        threading.Thread(target=self._watch_or_end, name="rank watch", daemon=True).start()

    def __enter__(self) -> RankWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, _ENDED_ELSEWHERE):
            self.close()
        else:
            self.fail(error)

    def spare(self, groups: Sequence[range], on_loss: Callable[[range, str], None]) -> None:
        """On rank 0: from now on the job goes on when a rank of one of ``groups`` ends, without that group's ranks.

        Only where the launcher and MPI let it. ``on_loss`` is told the group and why, in the watching thread.
        """
        self._on_loss, self._spare = on_loss, tuple(groups)

    @property
    def num_saturated(self) -> int:
        """On rank 0: keys and values that all ranks' caches could not hold, lost ranks' among them; a moment late."""
        return self._ranks.num_saturated

    def close(self) -> None:
        """This rank has done its work; the others may end, too."""
        self._closing, self._end_at = True, None
        self._links.send_all(Leaving())
        self._held.release()

    def fail(self, error: BaseException) -> None:
        """Let rank 0 report why this rank ends the job; returns on rank 0 itself, or when rank 0 does not answer."""
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        text = printable(f"failed{notes}: {type(error).__name__}: {error}")
        trace = printable("".join(traceback.format_exception(error)).rstrip())
        of_a_peer = isinstance(error, CommunicatorError) or type(error).__module__.startswith(_COMMUNICATION_MODULES)
        if of_a_peer and self._rank == 0:
            time.sleep(ending.CAUSE_SECONDS)  # the watching thread ends this process if it finds the cause
        self._closing = self._rank == 0 or not of_a_peer  # of a lost rank 0 the watching thread still speaks
        self._end.by_own_failure(Failure(text, trace, of_a_peer))

    def end_by(self, seconds: float, status: int, reason: str) -> None:
        """End every rank with ``status`` unless this one has ended within ``seconds``; of several calls the earliest end counts.

        May be called by a signal handler, which another one may interrupt.
        """
        end = self._clock() + seconds, status, reason
        self._end_at = end if self._end_at is None else min(self._end_at, end)

    # The watching thread

    def _watch_or_end(self) -> None:
        """A job that nothing watches any more must not go on."""
        try:
            self._watch()
        except BaseException:
            say(f"phalanx: the thread that watches the ranks has failed:\n{traceback.format_exc()}")
        finally:
            os._exit(FAILED)

    def _clock(self) -> float:
        """Seconds, without those in which the whole job was suspended."""
        return time.monotonic() - self._forgiven

    def _watch(self) -> None:
        poll = select.poll()
        for link in self._links:
            poll.register(link.sock, select.POLLIN)
        lateness = Lateness(STAMP_SECONDS)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(max(0.0, lateness.due - time.monotonic()) * 1e3)}
            for link in self._links:
                if link.sock.fileno() in ready and not self._read(link):
                    poll.unregister(link.sock)
                    self._links.forget(link.rank)
            if time.monotonic() >= lateness.due:
                self._tick(lateness.begin_round())

    def _tick(self, suspended: float) -> None:
        """Stamp, and look at all ranks unless this job was ``suspended``, in seconds: they may have said much that is not read yet."""
        if suspended:
            self._forgiven += suspended
            self._progress.forgive(suspended)
        self._links.send_all(self._progress.stamp(), droppable=True)
        self._on_stamp()
        self._end_without_cause()
        self._end_if_due()
        if suspended:
            self._ranks.forgive(suspended)
        else:
            self._judge()

    def _read(self, link: Link) -> bool:
        """Take what has come; False when the connection has ended and may."""
        messages = link.receive()
        if messages is None:
            self._lost(link.rank)
            return False
        for message in messages:
            if link.rank in self._ranks:
                self._ranks.hear(link.rank, message)
                self._take(self._ranks[link.rank], message)
        return True

    def _take(self, state: RankState, message: Message) -> None:
        match message:
            case Failure():
                self._failed(state, message)
            case Leaving():
                self._ranks.leave(state.rank)
            case StackRequest():
                self._links.send_all(Stacks(own_stacks()))
            case Stacks(text):
                state.stacks = text
            case End(status):
                os._exit(status)
            case Verdict(text):
                if not self._closing:
                    self._end.by_verdict(text)
            case Retire():
                # Open MPI's other ranks would wait in MPI_Finalize for one that exits without it, but not for one that is killed.
                os.kill(os.getpid(), signal.SIGKILL)

    def _failed(self, state: RankState, failure: Failure) -> None:
        """Rank 0 reports it; elsewhere it is rank 0 that has failed, and that reports itself before it aborts the job."""
        if self._rank == 0 and failure.of_a_peer:
            self._effects.append((self._clock() + ending.CAUSE_SECONDS, state, failure))
            return
        self._end_by_failure(state, failure)

    def _end_by_failure(self, state: RankState, failure: Failure) -> None:
        if self._retires(state, failure.text):
            return
        self._closing = self._failure_told = True
        if self._rank == 0:
            state.stacks = failure.trace
            self._end.by_verdict(f"{state} {failure.text}")

    def _lost(self, rank: int) -> None:
        if self._ranks.has_retired(rank):
            return
        state = self._ranks[rank]
        if self._failure_told:
            os._exit(1)
        if self._closing or (self._ranks.has_left(rank) and self._progress.activity == "waiting"):
            return
        if not self._retires(state, f"has ended (last: {state.stamp})"):
            self._end.by_verdict(f"{state} has ended (last: {state.stamp})")

    def _retires(self, state: RankState, what: str) -> bool:
        """Whether the job goes on without this rank's group, whose other ranks then leave."""
        group = next((group for group in self._spare if state.rank in group), None)
        if group is None or self._closing:
            return False
        if not self._ranks.has_retired(state.rank):
            self._ranks.retire(group)
            say(f"phalanx: {state} {what}; the other replicas go on")
            for rank in group:
                self._links.send(rank, Retire())
            self._on_loss(group, f"{state} {what}")
        return True

    def _end_without_cause(self) -> None:
        """A rank could not reach another, and none has shown as the cause: then the effect is what is known."""
        for due, state, failure in self._effects:
            if self._clock() > due and not self._ranks.has_retired(state.rank):
                self._end_by_failure(state, failure)

    def _end_if_due(self) -> None:
        if self._end_at is not None and self._clock() > self._end_at[0]:
            self._end.by_verdict(self._end_at[2], self._end_at[1])

    def _judge(self) -> None:
        if self._closing:
            return
        states = self._ranks.states()
        verdict = judge.silent_rank(states, self._limits)
        if verdict is None and self._rank == 0:
            verdict = judge.stalled_rank(states, self._limits)
        if verdict is not None:
            self._end.by_verdict(verdict)
        trouble = judge.trouble(states)
        if self._rank == 0 and trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble(trouble)
