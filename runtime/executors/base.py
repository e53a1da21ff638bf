# SPDX-License-Identifier: Apache-2.0
"""What the engine needs from an executor: one object per rank that computes planned steps on its shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.executors.scored_logits import LogitsReader
from phalanx.runtime.step import StepPlan, StepResult
from phalanx.runtime.step.times import DeviceTimes, StepTimes

__all__ = ["CacheSize", "Executor", "ReportsProducts", "Traced", "refuse_other_passes"]


@dataclass(frozen=True, slots=True)
class CacheSize:
    """An executor's key/value cache, as far as its planner needs to know it; the same on every rank.

    Attributes:
        kind: ``paged``: sequences hold blocks in any order; ``slots``: each holds one block for its whole length.
        block_size: tokens in a block.
    """

    kind: Literal["paged", "slots"]
    num_blocks: int
    block_size: int


def refuse_other_passes(plan: StepPlan) -> None:
    """Raise `ExecutorError` for a plan of another pass than decoding."""
    if plan.pass_id:
        raise ExecutorError(f"step {plan.step_id} is of pass {plan.pass_id}; this executor runs pass 0, decoding")


class Executor(Protocol):
    """Computes steps on one rank. All ranks of a replica call `execute` with the same plans in the same order.

    Attributes:
        logits_reader: who sees the logits of rows that score, on the ranks that hold them; None = no one.
    """

    logits_reader: LogitsReader | None

    @property
    def cache(self) -> CacheSize:
        """The key/value cache."""
        ...

    @property
    def device(self) -> str:
        """What computes, in words, for reports."""
        ...

    @property
    def device_times(self) -> DeviceTimes | None:
        """How long the device worked on steps and waited for them so far; None = not measured."""
        ...

    @property
    def num_saturated(self) -> int:
        """Keys and values of this rank that an fp8 cache could not hold and cut to its largest, so far; may be a few steps late."""
        ...

    @property
    def depth(self) -> int:
        """Steps that may be in flight before the leader must collect one: pipeline stages, plus one if it runs ahead."""
        ...

    @property
    def lookahead(self) -> int:
        """Steps of one sequence that may be in flight at once beyond the first: 0, or 1 if the device keeps the tokens."""
        ...

    @property
    def num_microbatches(self) -> int:
        """Groups of sequences that take turns, so that every pipeline stage has one to compute."""
        ...

    @property
    def step_times(self) -> StepTimes | None:
        """What decoding steps take, by which the leader chooses micro-batches; None = not measured."""
        ...

    def execute(self, plan: StepPlan) -> None:
        """Start a step; may return before it is finished. *Collective over the replica.*

        Raises:
            ExecutorError: the step could not be computed.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was not collected yet. Only on the leader; every executed step yields one result."""
        ...

    def close(self) -> None:
        """Finish what is in flight and release memory. *Collective over the replica.*"""
        ...


@runtime_checkable
class ReportsProducts(Protocol):
    """An executor that has several ways to multiply by the weights of some formats."""

    @property
    def products(self) -> str:
        """Which of them it takes, in words for reports; "" = there is but one."""
        ...


@runtime_checkable
class Traced(Protocol):
    """An executor that can record a timeline."""

    def write_trace(self, path: Path, comm: Communicator) -> None:
        """Write the timeline of the last steps of all ranks of ``comm``. *Collective.*

        Raises:
            ConfigError: the engine was not told to record one.
        """
        ...
