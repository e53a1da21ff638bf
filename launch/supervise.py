# SPDX-License-Identifier: Apache-2.0
"""``launch.serve --supervise``: one process outside MPI keeps the port and the clients, and starts the ranks again when they fail.

An HTTP request that was not answered yet waits in its HTTP process and is asked once more of the next ranks; a stream ends with an
error. The ranks are a job of their own (``mpirun``), so nothing of a failed one is left in the next.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from phalanx.launch.children import same_code
from phalanx.launch.drain import DRAIN_SIGNALS
from phalanx.launch.signals import heard
from phalanx.launch.streams import drop_broken_streams
from phalanx.parallel.errors import CommunicatorError, ConfigError
from phalanx.parallel.lateness import Lateness

if TYPE_CHECKING:
    from phalanx.runtime.server.link.frontend import Frontend

__all__ = ["PLACE_VARIABLE", "launcher_words", "supervise"]

_LOG = logging.getLogger("phalanx.serve")
PLACE_VARIABLE = "PHALANX_HTTP_PLACE"
"""Tells rank 0 where the HTTP processes of its supervisor are. Set by the supervisor only."""
POLL_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 60.0
GOOD_SERVICE_SECONDS = 600.0
"""Ranks that served for so long did not fail at their start; the next failure is the first of a new row."""
KILL_SECONDS = 5.0
"""How long ranks have to end after a second signal, and a launcher after SIGTERM."""
LAUNCHER_SECONDS = 10.0
"""How long a launcher has to end after rank 0: MPICH's waits for a host that is lost until TCP gives up."""
LAUNCH_SECONDS = 120.0
"""How long a launcher may take, besides --start-timeout, until ranks run."""
HEARSAY_SECONDS = 2.0
"""How much later than its launcher's end that of rank 0 may be heard of."""
FAILED = 1
MISTAKE = 2
"""Exit status of ranks that would make the same mistake again."""


def supervise(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Serve until drained, through failures of the ranks; returns the exit status.

    Raises:
        ConfigError: the port, the launcher or the number of ranks cannot be used.
    """
    from phalanx.launch.front import start_frontend

    command = [*launcher_words(args), sys.executable, "-P", "-m", "launch.serve", *words]
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts={args.max_restarts} is below 0; use 0 to start once")
    frontend = start_frontend(args, outlives_engine=True)
    supervisor = _Supervisor(frontend, command, args.max_restarts, args.start_timeout)
    for number in heard(DRAIN_SIGNALS):
        signal.signal(number, supervisor.on_signal)
    return supervisor.run()


def launcher_words(args: argparse.Namespace) -> list[str]:
    """Return what the ranks' command begins with; nothing for one rank without a launcher.

    Raises:
        ConfigError: the launcher or the number of ranks cannot be used.
    """
    sizes = [size for size in (args.tp, args.pp, args.dp) if size is not None]
    num_ranks = args.num_ranks
    if num_ranks is None:
        num_ranks = 1
        for size in sizes:
            num_ranks *= size
    if num_ranks < 1:
        raise ConfigError(f"--num-ranks={num_ranks} is below 1; use the number of GPUs")
    if args.launcher is not None:
        try:
            return shlex.split(args.launcher)
        except ValueError as error:
            raise ConfigError(f"--launcher {args.launcher} cannot be read: {error}; close the quotation") from None
    return [] if num_ranks == 1 else ["mpirun", "-n", str(num_ranks)]


@dataclass(slots=True)
class _Supervisor:
    """The loop over jobs of ranks.

    Attributes:
        start_seconds: longest that ranks may take until they are ready; they keep it themselves once their launcher has started them.
        draining: a signal or the admin route has asked for the end; no further job is started.
        has_come: rank 0 of the current job was heard of.
        ready_at: when the current job began to serve; None = it has not.
        job: number of the current job, from 1.
        end_by: when the launcher of the current job must have ended.
        lateness: of the loop while a job runs.
        has_drained: the HTTP processes have left because the last answer was given.
        num_passed_on: how many of ``signals`` a launcher has been sent.
    """

    frontend: Frontend
    command: Sequence[str]
    max_restarts: int
    start_seconds: float
    draining: bool = False
    has_come: bool = False
    ready_at: float | None = None
    job: int = 0
    end_by: float = math.inf
    lateness: Lateness = field(default_factory=lambda: Lateness(0.0))
    has_drained: bool = False
    num_failures: int = 0
    failed_at: float | None = None
    signals: list[int] = field(default_factory=list)
    num_passed_on: int = 0
    process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start jobs until one ends well, makes a mistake, or too many have failed."""
        try:
            status = self._run_job()
            while not self._is_last(status):
                self._pause(status)
                status = self._run_job()
        except CommunicatorError as error:  # without the HTTP side there is nothing to restart for
            _LOG.error("%s", error)
            self._kill(KILL_SECONDS)
            status = FAILED
        if status and not self.draining:
            self.frontend.tell_failed(f"the ranks ended with status {status}")
        self.frontend.stop()
        return status

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. The loop passes them on: the job may only just be starting.

        Ctrl-C after a drain by the admin route is the second. SIGTERM is not: it may come from the service manager whose hook asked.
        """
        is_second = number == signal.SIGINT and self.draining and not self.signals
        self.signals += [number, number] if is_second else [number]
        self.draining = True

    def _run_job(self) -> int:
        """Start a job and wait for its end; returns its status, 0 if it was told to end before it was ready."""
        if self.draining:
            return 0
        drop_broken_streams()  # the ranks' launcher has them, too, and would end at its first line
        self.job += 1
        self.has_come, self.ready_at, self.end_by = False, None, time.monotonic() + self.start_seconds + LAUNCH_SECONDS
        try:
            self.process = subprocess.Popen(
                self.command,
                env={**same_code(), PLACE_VARIABLE: self.frontend.place(self.job)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{self.command[0]} cannot be started: {error.strerror}; see --launcher") from None
        self.lateness.begin_round()
        while (status := self.process.poll()) is None:
            self._pass_on_signal(self.process)
            self._listen(POLL_SECONDS)
            if self.num_passed_on > 1:
                self._kill(KILL_SECONDS)
            elif time.monotonic() > self.end_by:
                why = "it was told to" if self.draining else "rank 0 is gone or has never come"
                _LOG.warning("%s does not end although %s; it is killed", self.command[0], why)
                self._kill(0.0)
                return 0 if self.has_drained or self._is_told_early() else FAILED
        if len(self.signals) > 1:
            return 128 + self.signals[-1]
        if status == 0 and not self.draining and not self._has_come():
            _LOG.error("%s ended with status 0 and started no rank of phalanx serve; see --launcher", self.command[0])
            return MISTAKE
        return 0 if self._is_told_early() else _exit_status(status)

    def _has_come(self) -> bool:
        """Whether rank 0 of this job was there. HTTP processes hear of its end by themselves, perhaps after the launcher's."""
        give_up = time.monotonic() + HEARSAY_SECONDS
        while not (self.has_come or self.draining or time.monotonic() > give_up):
            self._listen(POLL_SECONDS)
        return self.has_come or self.draining

    def _pass_on_signal(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the launcher of a signal: as SIGUSR1, which launchers hand to their ranks and do not end by.

        One that has not started its ranks yet may forget it. Ranks that load have nothing to finish, so it is killed soon.
        """
        if self.num_passed_on < len(self.signals):
            self.num_passed_on += 1
            process.send_signal(signal.SIGUSR1)
            if self.ready_at is None:
                self.end_by = min(self.end_by, time.monotonic() + KILL_SECONDS)

    def _is_told_early(self) -> bool:
        """Whether the end was asked for while ranks load, whatever their launcher makes of it."""
        return self.draining and self.ready_at is None

    def _listen(self, timeout_seconds: float) -> None:
        """Take what the HTTP processes say."""
        from phalanx.runtime.server.link.messages import DrainRequest, EngineGone, FrontendReady

        try:
            received = self.frontend.channels.receive(timeout_seconds)
        except CommunicatorError:
            if not self.draining:
                raise
            self.end_by += self.lateness.begin_round()
            self.has_drained = True  # the HTTP processes leave first
            self._expect_end()
            time.sleep(timeout_seconds)
            return
        self.end_by += self.lateness.begin_round()  # before the news sets a limit that counts from now
        for _, message in received:
            if isinstance(message, FrontendReady) and message.job == self.job and self.ready_at is None:
                self.has_come, self.ready_at = True, time.monotonic()
                if not self.draining:
                    self.end_by = math.inf
                if self.failed_at is not None:
                    _LOG.info("READY again %.1f s after the failure", self.ready_at - self.failed_at)
            elif isinstance(message, DrainRequest):
                self.draining, self.end_by = True, math.inf
            elif isinstance(message, EngineGone) and message.job == self.job:
                self.has_come = True
                self._expect_end()

    def _expect_end(self) -> None:
        """Rank 0 is gone, so the launcher ends soon or never."""
        self.end_by = min(self.end_by, time.monotonic() + LAUNCHER_SECONDS)

    def _is_last(self, status: int) -> bool:
        if status in (0, MISTAKE) or self.draining:
            return True
        if self.ready_at is not None and time.monotonic() - self.ready_at > GOOD_SERVICE_SECONDS:
            self.num_failures = 0
        self.num_failures += 1
        if self.num_failures > self.max_restarts:
            _LOG.error("the ranks failed %d times in a row (--max-restarts %d)", self.num_failures, self.max_restarts)
            return True
        return False

    def _pause(self, status: int) -> None:
        """Wait before the next start: not at all after the first failure, then 1, 2, 4, ... seconds."""
        self.failed_at = time.monotonic()
        seconds = 0.0 if self.num_failures == 1 else min(LONGEST_PAUSE_SECONDS, 2.0 ** (self.num_failures - 2))
        text = (
            f"the ranks ended with status {status}; restart {self.num_failures} of {self.max_restarts} in {seconds:g} s"
        )
        _LOG.warning("%s", text)
        self.frontend.tell_phase(text)
        while not self.draining and (left := self.failed_at + seconds - time.monotonic()) > 0:
            self._listen(min(left, POLL_SECONDS))

    def _kill(self, seconds: float) -> None:
        """End the launcher, and with it the ranks, if they have not ended by themselves in ``seconds``."""
        assert self.process is not None
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, KILL_SECONDS)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return
            os.killpg(self.process.pid, number)
        self.process.wait()


def _exit_status(status: int) -> int:
    """As a shell gives it: 128 + the signal that ended the process."""
    return 128 - status if status < 0 else status
