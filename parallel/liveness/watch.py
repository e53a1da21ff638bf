"""The thread that watches: stamps to rank 0 twice a second, and the end of the job when a rank is lost or stuck.

A process that ends closes its connections at once, whatever ended it; one that is stopped, or whose host or network is
gone, falls silent. Neither MPI nor launchers promise to notice either: under ``srun --mpi=pmi2`` a dead rank takes 30 s.
The thread calls nothing of MPI and ends the process by itself, because the main thread may be in a collective that
never returns.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

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
from phalanx.parallel.liveness import judge
from phalanx.parallel.liveness.hydra import HeldRanks
from phalanx.parallel.liveness.judge import Limits, RankState
from phalanx.parallel.liveness.last_words import keep_report, say, within
from phalanx.parallel.liveness.links import Link
from phalanx.parallel.liveness.messages import End, Failure, Leaving, Message, Retire, StackRequest, Stacks, Verdict
from phalanx.parallel.liveness.progress import RankProgress, Stamp

__all__ = ["RankWatch"]

STAMP_SECONDS = 0.5
FAILED = 1
"""Exit status of a job that ends with a report."""
LATE_SECONDS = 2.0
"""When this thread itself comes later than that, the whole job was suspended or starved: neither silence nor the time of a step counts."""
STACKS_SECONDS = 1.0
"""How long rank 0 waits for the stacks of ranks that still answer."""
FLUSH_SECONDS = 0.5
TELL_SECONDS = 2.0
"""How long rank 0 may take to tell clients, and to remove a file that names the server."""
ANSWER_SECONDS = 3.0
"""How long a failed rank waits for rank 0 to report it before it does so itself."""
CAUSE_SECONDS = 1.0
"""A rank's end reaches the ranks that talk to it within milliseconds, rank 0 perhaps later: how long it gets to show as the cause."""
SPEAKER_SECONDS = 2.0
"""When rank 0 is lost rank 1 speaks, this much later rank 2, and then the others leave: the first to leave ends them all."""
_STACK_LINES = 24
_ENDED_ELSEWHERE = (ConfigError, CheckpointError, RequestError, EndedElsewhereError, KeyboardInterrupt)
"""Most such mistakes are found by every rank, and an interrupt is not a failure: `launch.running` ends the job if need be."""
_COMMUNICATION_MODULES = ("mpi4py.", "cupy_backends.cuda.libs.nccl")
"""Whose exceptions mean, as `CommunicatorError` does, that another rank is out of reach."""


class RankWatch:
    """Watches from construction (*collective*) until `close`, or as a context around everything that ranks do together.

    Args:
        world: all ranks, raw: the watch's own collectives do not show in stamps.
        progress: what this rank is doing.
        on_failure: on rank 0, told the verdict before the process ends; runs in the watching thread.
        on_trouble: on rank 0, told when a rank falls silent, and None when all answer again; runs in the same thread.
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
        self._on_failure, self._on_trouble, self._on_stamp = on_failure, on_trouble, on_stamp
        self._directory = report_directory
        names = [name.decode() for name in gather_bytes(world, f"{socket.gethostname()}, pid {os.getpid()}".encode())]
        sockets, reason = connect_ranks(world)
        self._held = HeldRanks.exchange(world, sockets)
        self._links = {rank: Link(rank, sock) for rank, sock in sockets.items()}
        if reason is not None and world.rank == 0:
            say(f"phalanx: ranks do not watch each other: {reason}; a lost rank is noticed by the launcher alone")
        self._states = {rank: RankState(rank, names[rank]) for rank in (world.rank, *self._links)}
        self._heard = dict.fromkeys(self._links, time.monotonic())
        self._left_at: dict[int, float] = {}
        self._num_saturated = dict.fromkeys(self._links, 0)
        self._lock = threading.Lock()
        self._closing = self._failure_told = False
        self._effects: list[tuple[float, RankState, Failure]] = []
        self._speaking = threading.Lock()
        self._trouble: str | None = None
        self._end_at: tuple[float, int, str] | None = None
        self._spare: Sequence[range] = ()
        self._on_loss: Callable[[range, str], None] = lambda _, __: None
        self._retired: set[int] = set()
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
        return self._progress.num_saturated + sum(self._num_saturated.values())

    def close(self) -> None:
        """This rank has done its work; the others may end, too."""
        self._closing, self._end_at = True, None
        self._send_all(Leaving())
        self._held.release()

    def fail(self, error: BaseException) -> None:
        """Let rank 0 report why this rank ends the job; returns on rank 0 itself, or when rank 0 does not answer."""
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        text = printable(f"failed{notes}: {type(error).__name__}: {error}")
        trace = printable("".join(traceback.format_exception(error)).rstrip())
        of_a_peer = isinstance(error, CommunicatorError) or type(error).__module__.startswith(_COMMUNICATION_MODULES)
        if self._rank == 0:
            time.sleep(CAUSE_SECONDS if of_a_peer else 0.0)
            self._speaking.acquire()  # not while the watching thread, which may know the cause, ends this process
        self._closing = True
        self._send_all(Failure(text, trace, of_a_peer))
        if self._rank:
            self._flush(FLUSH_SECONDS)
            time.sleep(ANSWER_SECONDS)  # rank 0's answer ends this process
        else:
            self._states[0].stacks, verdict = trace, f"{self._states[0]} {text}"
            within(TELL_SECONDS, lambda: self._on_failure(verdict))
            for line in keep_report(self._directory, judge.report(verdict, self._states_at(time.monotonic()))):
                say(line)

    def end_by(self, seconds: float, status: int, reason: str) -> None:
        """End every rank with ``status`` unless this one has ended within ``seconds``; of several calls the earliest end counts.

        May be called by a signal handler, which another one may interrupt.
        """
        end = time.monotonic() + seconds, status, reason
        self._end_at = end if self._end_at is None else min(self._end_at, end)

    # The watching thread

    def _watch_or_end(self) -> None:
        """A job that nothing watches any more must not go on."""
        try:
            self._watch()
        finally:
            os._exit(FAILED)

    def _watch(self) -> None:
        poll = select.poll()
        for link in self._links.values():
            poll.register(link.sock, select.POLLIN)
        due = time.monotonic()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(max(0.0, due - time.monotonic()) * 1e3)}
            for link in [link for link in self._links.values() if link.sock.fileno() in ready]:
                if not self._read(link):
                    poll.unregister(link.sock)
                    del self._links[link.rank]
            now = time.monotonic()
            if now >= due:
                self._tick(now, now - due)
                due = now + STAMP_SECONDS

    def _tick(self, now: float, late: float) -> None:
        """Stamp, and look at all ranks unless this thread comes so ``late`` that they may have said much that is not read yet."""
        is_late = late > LATE_SECONDS
        if is_late:
            self._progress.forgive(late)
        self._send_all(self._progress.stamp(), droppable=True)
        self._on_stamp()
        self._end_without_cause(now)
        self._end_if_due(now)
        if is_late:
            self._heard = {rank: heard + late for rank, heard in self._heard.items()}
        else:
            self._judge(now)

    def _read(self, link: Link) -> bool:
        """Take what has come; False when the connection has ended and may."""
        messages = link.receive()
        if messages is None:
            self._lost(link.rank)
            return False
        for message in messages:
            if link.rank in self._states:
                self._heard[link.rank] = time.monotonic()
                self._take(self._states[link.rank], message)
        return True

    def _take(self, state: RankState, message: Message) -> None:
        match message:
            case Stamp():
                state.stamp = message
                self._num_saturated[state.rank] = message.num_saturated
            case Failure():
                self._failed(state, message)
            case Leaving():
                self._left_at[state.rank] = time.monotonic()
            case StackRequest():
                self._send_all(Stacks(_stacks()))
            case Stacks(text):
                state.stacks = text
            case End(status):
                os._exit(status)
            case Verdict(text):
                if not self._closing:
                    self._end_job(text)
            case Retire():
                # Open MPI's other ranks would wait in MPI_Finalize for one that exits without it, but not for one that is killed.
                os.kill(os.getpid(), signal.SIGKILL)

    def _failed(self, state: RankState, failure: Failure) -> None:
        """Rank 0 reports it; elsewhere it is rank 0 that has failed, and that reports itself before it aborts the job."""
        if self._rank == 0 and failure.of_a_peer:
            self._effects.append((time.monotonic() + CAUSE_SECONDS, state, failure))
            return
        self._end_by_failure(state, failure)

    def _end_by_failure(self, state: RankState, failure: Failure) -> None:
        if self._retires(state, failure.text):
            return
        self._closing = self._failure_told = True
        if self._rank == 0:
            state.stacks = failure.trace
            self._end_job(f"{state} {failure.text}")

    def _lost(self, rank: int) -> None:
        if rank in self._retired:
            return
        state = self._states[rank]
        if self._failure_told:
            os._exit(1)
        if self._closing or (rank in self._left_at and self._progress.activity == "waiting"):
            return
        if not self._retires(state, f"has ended (last: {state.stamp})"):
            self._end_job(f"{state} has ended (last: {state.stamp})")

    def _retires(self, state: RankState, what: str) -> bool:
        """Whether the job goes on without this rank's group, whose other ranks then leave."""
        group = next((group for group in self._spare if state.rank in group), None)
        if group is None or self._closing:
            return False
        if state.rank not in self._retired:
            self._retired.update(group)
            for rank in group:
                self._states.pop(rank, None)
                self._heard.pop(rank, None)
            say(f"phalanx: {state} {what}; the other replicas go on")
            with self._lock:
                for rank in group:
                    with contextlib.suppress(KeyError, OSError):
                        self._links[rank].send(Retire())
            self._on_loss(group, f"{state} {what}")
        return True

    def _end_without_cause(self, now: float) -> None:
        """A rank could not reach another, and none has shown as the cause: then the effect is what is known."""
        for due, state, failure in self._effects:
            if now > due and state.rank not in self._retired:
                self._end_by_failure(state, failure)

    def _end_if_due(self, now: float) -> None:
        if self._end_at is not None and now > self._end_at[0]:
            self._end_job(self._end_at[2], self._end_at[1])

    def _judge(self, now: float) -> None:
        if self._closing:
            return
        states = self._states_at(now)
        verdict = judge.silent_rank(states, self._limits)
        if verdict is None and self._rank == 0:
            verdict = judge.stalled_rank(states, self._limits)
        if verdict is not None:
            self._end_job(verdict)
        trouble = judge.trouble(states)
        if self._rank == 0 and trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble(trouble)

    def _states_at(self, now: float) -> list[RankState]:
        own = self._states[self._rank]
        own.stamp = self._progress.stamp()
        for rank, heard in self._heard.items():
            self._states[rank].silent = now - heard
        for rank, left_at in self._left_at.items():
            self._states[rank].left = now - left_at
        return sorted(self._states.values(), key=lambda state: state.rank)

    def _end_job(self, verdict: str, status: int = FAILED) -> NoReturn:
        """Say why, tell clients, and end this process; the others follow when their connections close."""
        self._speaking.acquire(timeout=ANSWER_SECONDS)  # for good: the job has one verdict
        if self._rank == 0:
            self._speak(verdict, status)
            self._send_all(End(status))
        else:
            time.sleep(min(self._rank - 1, 2) * SPEAKER_SECONDS)
            if self._rank <= 2:
                say(f"phalanx: {verdict}")
            self._send_all(Verdict(verdict))
        for state in self._states_at(time.monotonic()):
            if state.silent > judge.SUSPICIOUS_SECONDS:
                self._held.kill(state.rank)
        os._exit(status)

    def _speak(self, verdict: str, status: int) -> None:
        """Tell people and clients.

        The verdict comes first, because a launcher that sees a rank end kills the others within milliseconds. One that does not see it
        looks for ended ranks whenever something is written: it gets the whole report at once, and clients' processes, which hold their logs
        until this one has ended, know the verdict before.
        """
        parts = [f"phalanx: {verdict}"]
        if not self._held:
            say(parts.pop())
        within(TELL_SECONDS, lambda: self._on_failure(verdict))
        if status == FAILED:
            text = judge.report(verdict, self._collect_stacks())
            parts += [*text.splitlines()[1:], *keep_report(self._directory, text)]
        if parts:
            say("\n".join(parts))

    def _collect_stacks(self) -> list[RankState]:
        self._send_all(StackRequest())
        self._states[self._rank].stacks = _stacks()
        deadline = time.monotonic() + STACKS_SECONDS
        waiting = {link.sock.fileno(): link for link in self._links.values() if self._awaits_stacks(link.rank)}
        poll = select.poll()  # takes any descriptor, unlike select
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                link = waiting[descriptor]
                messages = link.receive()
                for message in messages or ():
                    if isinstance(message, Stacks):
                        self._states[link.rank].stacks = message.text
                if messages is None or self._states[link.rank].stacks:
                    del waiting[descriptor]
                    poll.unregister(descriptor)
        return self._states_at(time.monotonic())

    def _awaits_stacks(self, rank: int) -> bool:
        return rank in self._states and not self._states[rank].stacks

    def _flush(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            while not all(link.flush() for link in self._links.values()) and time.monotonic() < deadline:
                time.sleep(0.005)

    def _send_all(self, message: Message, droppable: bool = False) -> None:
        with self._lock:
            for link in list(self._links.values()):
                try:
                    link.send(message, droppable)
                except OSError:  # its end shows when it is read
                    continue


def _stacks() -> str:
    """What the threads of this process other than this one are executing, innermost call last."""
    frames = sys._current_frames()
    texts = []
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident in frames:
            lines = "".join(traceback.format_stack(frames[thread.ident])).splitlines()
            texts += [f"thread {thread.name}:", *lines[-_STACK_LINES:]]
    return printable("\n".join(texts))
