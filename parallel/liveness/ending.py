# SPDX-License-Identifier: Apache-2.0
"""The end of the job: one verdict, told to clients and said once, the stacks of all ranks, and then this process.

Whatever it waits for has a limit: ranks and clients that do not answer must not keep the job from ending.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from phalanx.parallel.errors import printable
from phalanx.parallel.liveness import judge
from phalanx.parallel.liveness.hydra import HeldRanks
from phalanx.parallel.liveness.known_ranks import KnownRanks
from phalanx.parallel.liveness.last_words import KEEP_SECONDS, SAY_SECONDS, keep_report, say, within
from phalanx.parallel.liveness.links import Link, Links
from phalanx.parallel.liveness.messages import End, Failure, StackRequest, Stacks, Verdict
from phalanx.parallel.liveness.progress import STAMP_SECONDS

__all__ = ["FAILED", "JobEnd", "own_stacks"]

FAILED = 1
"""Exit status of a job that ends with a report."""
STACKS_SECONDS = 1.0
"""How long rank 0 waits for the stacks of ranks that still answer."""
FLUSH_SECONDS = 0.5
TELL_SECONDS = 2.0
"""How long rank 0 may take to tell clients, and to remove a file that names the server."""
CAUSE_SECONDS = 1.0
"""A rank's end reaches the ranks that talk to it within milliseconds, rank 0 perhaps later: how long it gets to show as the cause."""
ANSWER_SECONDS = STAMP_SECONDS + CAUSE_SECONDS + TELL_SECONDS + STACKS_SECONDS + KEEP_SECONDS + SAY_SECONDS
"""How long a failed rank waits for rank 0 to report it before it does so itself: as long as rank 0 may take, from one stamp to the next on."""
SPEAKER_SECONDS = 2.0
"""When rank 0 is lost rank 1 speaks, this much later rank 2, and then the others leave: the first to leave ends them all."""
_STACK_LINES = 24


class JobEnd:
    """How this rank ends the job.

    Args:
        held: what this rank keeps from MPICH's launcher until it has spoken.
        on_failure: on rank 0, told the verdict before the process ends, in a thread that may take `TELL_SECONDS`.
        report_directory: where the whole report is kept as a file; None = nowhere.
    """

    def __init__(
        self, rank: int, links: Links, ranks: KnownRanks, held: HeldRanks, on_failure: Callable[[str], None],
        report_directory: Path | None,
    ) -> None:  # fmt: skip
        self._rank, self._links, self._ranks, self._held = rank, links, ranks, held
        self._on_failure, self._directory = on_failure, report_directory
        self._speaking = threading.Lock()

    def by_verdict(self, verdict: str, status: int = FAILED) -> NoReturn:
        """Say why, tell clients, and end this process; the others follow when their connections close. For the watching thread."""
        self._speaking.acquire(timeout=ANSWER_SECONDS)  # for good: the job has one verdict
        if self._rank == 0:
            self._speak(verdict, status)
            self._links.send_all(End(status))
        else:
            time.sleep(min(self._rank - 1, 2) * SPEAKER_SECONDS)
            if self._rank <= 2:
                say(f"phalanx: {verdict}")
            self._links.send_all(Verdict(verdict))
        for state in self._ranks.silent(judge.SUSPICIOUS_SECONDS):
            self._held.kill(state.rank)
        os._exit(status)

    def by_own_failure(self, failure: Failure) -> None:
        """Report it on rank 0, or let rank 0 do so; returns on rank 0, or when it does not answer. For the main thread."""
        if self._rank:
            self._links.send_all(failure)
            self._links.flush(FLUSH_SECONDS)
            time.sleep(ANSWER_SECONDS)  # rank 0's answer ends this process
            return
        self._speaking.acquire()  # not while the watching thread ends this process
        self._links.send_all(failure)
        self._ranks.own.stacks, verdict = failure.trace, f"{self._ranks.own} {failure.text}"
        within(TELL_SECONDS, lambda: self._on_failure(verdict))
        for line in keep_report(self._directory, judge.report(verdict, self._ranks.states())):
            say(line)

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
            self._collect_stacks()
            text = judge.report(verdict, self._ranks.states())
            parts += [*text.splitlines()[1:], *keep_report(self._directory, text)]
        if parts:
            say("\n".join(parts))

    def _collect_stacks(self) -> None:
        self._links.send_all(StackRequest())
        self._ranks.own.stacks = own_stacks()
        deadline = time.monotonic() + STACKS_SECONDS
        waiting = {link.sock.fileno(): link for link in self._links if self._awaits_stacks(link)}
        poll = select.poll()  # takes any descriptor, unlike select
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                link = waiting[descriptor]
                messages = link.receive()
                for message in messages or ():
                    if isinstance(message, Stacks):
                        self._ranks[link.rank].stacks = message.text
                if messages is None or not self._awaits_stacks(link):
                    del waiting[descriptor]
                    poll.unregister(descriptor)

    def _awaits_stacks(self, link: Link) -> bool:
        return link.rank in self._ranks and not self._ranks[link.rank].stacks


def own_stacks() -> str:
    """What the threads of this process other than this one are executing, innermost call last."""
    frames = sys._current_frames()
    texts = []
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident in frames:
            lines = "".join(traceback.format_stack(frames[thread.ident])).splitlines()
            texts += [f"thread {thread.name}:", *lines[-_STACK_LINES:]]
    return printable("\n".join(texts))
