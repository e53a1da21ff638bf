"""Short ways to make a scheduler, requests and results for tests of one behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from phalanx.runtime.kv_cache import BlockPlanner
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.scheduler import Scheduler, SchedulerConfig
from phalanx.runtime.step import StepPlan, StepResult

EOS = 1
CONFIG = SchedulerConfig(
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    max_queued_requests=32,
    vocab_size=100,
    eos_token_ids=(EOS,),
)


def make_scheduler(num_blocks: int = 64, block_size: int = 4, **changes: Any) -> Scheduler:
    config = replace(CONFIG, **changes)
    return Scheduler(config, BlockPlanner(num_blocks, block_size, config.max_num_seqs, config.max_model_len))


def make_request(
    request_id: str,
    prompt: Sequence[int] = (10, 11, 12),
    deadline: float | None = None,
    fork_from: str | None = None,
    cache_salt: str = "",
    **params: Any,
) -> Request:
    return Request(
        request_id, tuple(prompt), SamplingParams(**{"max_tokens": 8, **params}), deadline, fork_from, cache_salt
    )


def make_prompt(length: int, first: int = 10) -> tuple[int, ...]:
    """A prompt that shares no block with those of another ``first``."""
    return (first, *(2 + (first + i) % 97 for i in range(1, length)))


def make_result(plan: StepPlan, token: int | Sequence[int] = 5) -> StepResult:
    """A result that gives ``token`` to every row that samples, or one each, and its target to every row that scores."""
    token_ids = plan.targets.copy()
    token_ids[: plan.num_sampled] = token
    return StepResult(plan.step_id, token_ids)


def sampling_seqs(plan: StepPlan) -> list[int]:
    """Sequences that the plan samples a token of."""
    return plan.seq_indices[plan.sampling_seqs].tolist()


def plan_step(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now)
    assert plan is not None
    return plan


def run_step(scheduler: Scheduler, token: int | Sequence[int] = 5, now: float = 0.0) -> StepPlan:
    """Plan a step and apply its result."""
    plan = plan_step(scheduler, now)
    scheduler.apply(make_result(plan, token), now)
    return plan
