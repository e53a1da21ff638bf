# SPDX-License-Identifier: Apache-2.0
"""The scheduler's limits and its counts."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import SchedulingPolicy
from phalanx.runtime.step.times import StepTimes

__all__ = ["SchedulerConfig", "SchedulerStats"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one replica.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: maximum number of tokens computed in one step.
        max_model_len: maximum number of tokens of prompt and output together.
        max_queued_requests: requests that may wait to run.
        vocab_size: prompt token ids are below it.
        eos_token_ids: tokens that end a generation unless the request ignores them.
        prefix_end: see `phalanx.runtime.attention.AttentionSpec`; prompts end their prefix with these tokens.
        policy: ``fcfs`` = requests run in the order of arrival, ``priority`` = first by `Request.priority`.
        num_microbatches: maximum number of plans of different sequences that are kept in flight.
        lookahead: 1 = a sequence may be planned again before its last token is known.
        seed: where the seeds of requests without one are drawn from.
        step_times: decides for fewer micro-batches where they are faster; None = not measured.

    Raises:
        ConfigError: a limit is below what can work.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_queued_requests: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefix_end: tuple[int, ...] = ()
    policy: SchedulingPolicy = "fcfs"
    num_microbatches: int = 1
    lookahead: int = 0
    seed: int = 0
    step_times: StepTimes | None = None

    @property
    def longest_prefix(self) -> int:
        """Tokens that a step has room for next to one of every other sequence."""
        return self.max_num_batched_tokens - self.max_num_seqs + 1

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "max_queued_requests",
            "vocab_size",
            "num_microbatches",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is below 1; use at least 1")
        if self.lookahead not in (0, 1):
            raise ConfigError(f"lookahead={self.lookahead} is not known; use 0 or 1")
        if self.prefix_end and self.longest_prefix < 1:
            raise ConfigError(
                f"--max-num-batched-tokens={self.max_num_batched_tokens} leaves no room for a prompt of a model that computes it "
                f"in one step next to --max-num-seqs={self.max_num_seqs} sequences; raise one or lower the other"
            )


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts for metrics and health; the last three since the start.

    Attributes:
        num_running: sequences with a row of the batch state.
        num_waiting: requests without one, preempted sequences among them.
        kv_blocks_used, kv_blocks_total: blocks that sequences hold, and all blocks.
        num_preemptions: times that a sequence lost its blocks and had to be computed again.
        prefix_query_tokens, prefix_hit_tokens: tokens looked up in the prefix cache at admission, and found
            there.
    """

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
