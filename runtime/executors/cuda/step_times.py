# SPDX-License-Identifier: Apache-2.0
"""Times of a pipeline's decoding steps, measured with the graphs that serve them."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.cuda.graphs import DECODE_ROWS
from phalanx.runtime.step import ADMISSION, StepPlan, StepResult
from phalanx.runtime.step.times import StepTimes

__all__ = ["TimedExecutor", "decoding_step", "measure_step_times", "measured_sizes"]

_ROUNDS = 2
"""The fastest counts: the very first step makes NCCL connect, and any may meet another process's work."""


class TimedExecutor(Protocol):
    """What is measured here: an executor that can replay its stage of a step."""

    @property
    def topology(self) -> Topology:
        """This rank's place."""
        ...

    @property
    def num_microbatches(self) -> int:
        """How many steps of different sequences can be in flight."""
        ...

    def execute(self, plan: StepPlan) -> None:
        """Start a step. *Collective over the replica.*"""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was not collected yet. Only on the leader."""
        ...

    def replay_seconds(self, num_seqs: int) -> float:
        """Device time of this stage for the decoding step executed last. *Collective over the stage.*"""
        ...


def measured_sizes(max_num_seqs: int, num_stages: int, num_microbatches: int) -> list[int]:
    """Sequences of the steps worth timing, up to a micro-batch of all sequences.

    Powers of two, from 16 on sizes halfway between them, and the micro-batches of all sequences themselves: a step that fills its last
    row of tiles badly takes longer than the line between its neighbours says, and the largest number of sequences is what most steps
    of a busy server have.
    """
    largest = -(-max_num_seqs // num_stages)
    sizes = {1 << exponent for exponent in range((largest - 1).bit_length() + 1)}
    sizes |= {size // 2 * 3 for size in sizes if size >= 16 and size // 2 * 3 < largest}
    sizes |= {
        DECODE_ROWS.size(-(-max_num_seqs // count), max_num_seqs) for count in range(num_stages, num_microbatches + 1)
    }
    return sorted(sizes)


def measure_step_times(executor: TimedExecutor, max_num_seqs: int, comm: Communicator) -> StepTimes:
    """Time one step after the other, with nothing else in the pipe. *Collective over the replica.*

    The steps write to the first position of the first block only, which every sequence writes before it reads it.
    """
    topology = executor.topology
    sizes = measured_sizes(max_num_seqs, topology.layout.pp, executor.num_microbatches)
    own = np.array([[_latency(executor, size, comm), _stage_time(executor, size, comm)] for size in sizes])
    latencies, stages = comm.all_gather(own).max(axis=0).T.tolist()
    return StepTimes(topology.layout.pp, tuple(sizes), tuple(stages), tuple(latencies))


def decoding_step(num_seqs: int) -> StepPlan:
    """The first ``num_seqs`` sequences compute and sample a token each, greedily."""
    seq_indices, ones, zeros = np.arange(num_seqs, dtype=np.int32), *(np.full(num_seqs, i, np.int32) for i in (1, 0))
    admissions = np.zeros(num_seqs, ADMISSION)  # which is greedy
    admissions["seq_index"], admissions["num_logprobs"] = seq_indices, -1
    return StepPlan.pack(0, seq_indices, zeros, ones, zeros, seq_indices, admissions=admissions)


def _latency(executor: TimedExecutor, num_seqs: int, comm: Communicator) -> float:
    """Seconds from a step's start to its result on the leader's host; 0 on other ranks. *Collective.*"""
    plan = decoding_step(num_seqs)
    seconds = []
    for _ in range(_ROUNDS):
        comm.barrier()
        start = time.perf_counter()
        executor.execute(plan)
        if executor.topology.is_leader:
            executor.collect()
            seconds.append(time.perf_counter() - start)
    return min(seconds, default=0.0)


def _stage_time(executor: TimedExecutor, num_seqs: int, comm: Communicator) -> float:
    """Seconds of this rank's stage. *Collective.* Tensor-parallel peers start together: a sum waits for the last of them."""
    seconds = []
    for _ in range(_ROUNDS):
        comm.barrier()
        seconds.append(executor.replay_seconds(num_seqs))
    return min(seconds)
