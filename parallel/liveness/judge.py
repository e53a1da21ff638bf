# SPDX-License-Identifier: Apache-2.0
"""From what ranks say of themselves to a verdict: which rank keeps the job from going on, and the report about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.liveness.progress import Stamp

__all__ = ["Limits", "RankState", "report", "silent_rank", "stalled_rank", "trouble"]

LEAVE_SECONDS = 5.0
"""How long a rank may be computing after another has left: that one may have left early by milliseconds."""
SUSPICIOUS_SECONDS = 3.0
"""Six stamps in a row missing: not well, though perhaps only starved of a processor."""


@dataclass(frozen=True, slots=True)
class Limits:
    """In seconds.

    Attributes:
        step: longest that no step may end while there is work; also the limit of silence while ranks start, when a
            library may keep Python from running.
        start: longest that a rank may take until it is ready.
        silence: longest that nothing may be heard of a rank that serves.

    Raises:
        ConfigError: a limit is not above 0.
    """

    step: float = 300.0
    start: float = 1800.0
    silence: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.step < 1e9:
            raise ConfigError(f"--stall-timeout={self.step:g} is out of range; use seconds above 0 (default 300)")
        if not 0 < self.start < 1e9:
            raise ConfigError(f"--start-timeout={self.start:g} is out of range; use seconds above 0 (default 1800)")

    def of_silence(self, states: Sequence[RankState]) -> float:
        """The limit now. As soon as one rank is ready, all have loaded."""
        return self.step if _are_starting(states) else min(self.step, self.silence)


@dataclass(slots=True)
class RankState:
    """What is known of one rank.

    Attributes:
        name: host and process id.
        silent: seconds since it was last heard.
        left: seconds since it said that its work is done; None = it has not.
        stacks: what its threads were executing, where it could be asked.
    """

    rank: int
    name: str
    stamp: Stamp = Stamp()
    silent: float = 0.0
    left: float | None = None
    stacks: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name})"


def silent_rank(states: Sequence[RankState], limits: Limits) -> str | None:
    """The verdict on a rank that is stopped or out of reach, or that left while others need it."""
    computing = next((state for state in states if state.stamp.activity == "stepping"), None)
    for state in states:
        if state.left is not None:
            if computing is not None and state.left > LEAVE_SECONDS and computing is not state:
                return (
                    f"{state} has left while rank {computing.rank} is {computing.stamp.phase}; "
                    "every rank must make the same calls"
                )
        elif state.silent > limits.of_silence(states):
            return (
                f"{state} has given no sign of life for {state.silent:.0f} s (last: {state.stamp}); "
                "it is stopped, or its host or network is gone"
            )
    return None


def stalled_rank(states: Sequence[RankState], limits: Limits) -> str | None:
    """The verdict when no step ends, or the start does not."""
    for state in states:
        stamp = state.stamp
        limit = {"stepping": limits.step, "starting": limits.start, "waiting": None}[stamp.activity]
        if state.left is not None or limit is None or stamp.seconds + state.silent <= limit:
            continue
        what = f"no step has ended for {stamp.seconds:.0f} s (--stall-timeout {limit:g})"
        if stamp.activity == "starting":
            what = f"{state} has been {stamp.phase} for {stamp.seconds:.0f} s (limit {limit:g})"
        return f"{what}; {_suspicion(states)}"
    return None


def _are_starting(states: Sequence[RankState]) -> bool:
    return all(state.stamp.activity == "starting" for state in states)


def _suspicion(states: Sequence[RankState]) -> str:
    """Which rank the others wait for: a silent one, else the one furthest back or outside a collective."""
    silent = max(states, key=lambda state: state.silent)
    if silent.silent > SUSPICIOUS_SECONDS:
        return f"{silent} has given no sign of life for {silent.silent:.0f} s"
    stepping = [state for state in states if state.stamp.step == min(state.stamp.step for state in states)]
    outside = [state for state in stepping if not state.stamp.collective]
    suspects = stepping if len(stepping) < len(states) else outside
    if 0 < len(suspects) < len(states):
        return f"the others wait for {', '.join(map(str, suspects))}: {suspects[0].stamp}"
    if len(states) == 1:
        return f"{states[0]} is {states[0].stamp}"
    return "every rank is in the same step; a device or the network between them hangs"


def trouble(states: Sequence[RankState]) -> str | None:
    """Why ``/health`` must not be green although no limit is reached yet; None = every rank answers."""
    for state in states:
        if state.left is None and state.silent > SUSPICIOUS_SECONDS and not _are_starting(states):
            return f"{state} has given no sign of life for {state.silent:.0f} s"
    return None


def report(verdict: str, states: Sequence[RankState]) -> str:
    """The whole story: the verdict, each rank's last stamp, and what its threads were executing."""
    lines = [verdict]
    for state in states:
        silent = f"; silent for {state.silent:.1f} s" if state.silent > SUSPICIOUS_SECONDS else ""
        lines.append(f"  {state}: {state.stamp}{silent}")
        lines += [f"    | {line}" for line in state.stacks.splitlines()]
    return "\n".join(lines)
