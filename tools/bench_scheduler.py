"""What the scheduler costs per step and per request, with the executor stubbed out.

    python tools/bench_scheduler.py                  # steady decoding, requests that come and go
    python tools/bench_scheduler.py --reserve        # what blocks kept free at admission save in a small cache

Times are processor time of the one thread, so that other work on the machine does not count; ``wall`` shows both.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from phalanx.runtime.kv_cache import BlockPlanner, CachePlanner, SlotPlanner
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.scheduler import Scheduler, SchedulerConfig
from phalanx.runtime.step import StepPlan, StepResult

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 50_000


@dataclass
class Times:
    """Microseconds of each step's scheduler work: plan, pack, apply, columns of deltas."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def report(self, name: str) -> str:
        cpu, wall = (np.percentile(values, (50, 99)) for values in (self.processor, self.wall))
        return (
            f"{name:<46} {cpu[0]:7.0f} us median {cpu[1]:7.0f} us p99   wall {wall[0]:7.0f} us median"
            f"   ({len(self.wall)} steps)"
        )


def make_config(num_seqs: int, num_microbatches: int, lookahead: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=MAX_MODEL_LEN,
        max_queued_requests=1_000_000,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(1,),
        num_microbatches=num_microbatches,
        lookahead=lookahead,
    )


def submit(scheduler: Scheduler, index: int, prompt_len: int, output_len: int) -> None:
    prompt = np.random.default_rng(index).integers(2, VOCAB_SIZE, prompt_len).tolist()
    scheduler.submit(Request(f"request-{index}", tuple(prompt), SamplingParams(max_tokens=output_len)), 0.0)


def stub_result(plan: StepPlan) -> StepResult:
    return StepResult(plan.step_id, np.full(len(plan.rows), 7, np.int32))


def steady_decoding(num_seqs: int, num_steps: int, num_microbatches: int, lookahead: int, cache: CachePlanner) -> Times:
    """All sequences decode; a step is timed when it computes one token of a whole micro-batch."""
    scheduler = Scheduler(make_config(num_seqs, num_microbatches, lookahead), cache)
    rng = np.random.default_rng(0)
    for index in range(num_seqs):  # lengths differ, so that block boundaries do not fall into one step
        submit(scheduler, index, int(rng.integers(32, 160)), 2000)
    in_flight: deque[StepPlan] = deque()
    times = Times()
    while len(times.wall) < num_steps:
        wall, cpu = time.perf_counter(), time.thread_time()
        is_steady = False
        while len(in_flight) < num_microbatches + lookahead and (plan := scheduler.plan(0.0)) is not None:
            is_steady = plan.num_decodes == plan.num_seqs and plan.num_seqs >= num_seqs // num_microbatches
            in_flight.append(plan)
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        result = stub_result(in_flight.popleft())
        more_wall, more_cpu = time.perf_counter(), time.thread_time()
        scheduler.apply(result, 0.0)
        scheduler.take_batches()
        if is_steady:
            times.wall.append(1e6 * (wall + time.perf_counter() - more_wall))
            times.processor.append(1e6 * (cpu + time.thread_time() - more_cpu))
    return times


def request_cost(num_seqs: int, num_requests: int, prompt_len: int, output_len: int, share: bool) -> str:
    """Everything that a request costs from submit to its end, its share of the steps included."""
    num_blocks = num_seqs * -(-(prompt_len + output_len) // BLOCK_SIZE)
    cache = BlockPlanner(num_blocks, BLOCK_SIZE, num_seqs, MAX_MODEL_LEN, share_prefixes=share)
    scheduler = Scheduler(make_config(num_seqs, 1, 0), cache)
    for index in range(num_requests):
        submit(scheduler, index, prompt_len, output_len)
    num_steps, start = 0, time.thread_time()
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.apply(stub_result(plan), 0.0)
        scheduler.take_batches()
        num_steps += 1
    spent = time.thread_time() - start
    name = f"{num_requests} requests {prompt_len}/{output_len}, prefixes {'kept' if share else 'not kept'}"
    per_token = 1e6 * spent / (num_requests * output_len)
    return f"{name:<46} {1e6 * spent / num_steps:7.0f} us a step   {per_token:6.2f} us an output token"


class ScaledReserve(BlockPlanner):
    """Keeps ``factor`` times the blocks free at admission that the scheduler asks for."""

    factor = 1.0

    def admit(
        self, seq_index: int, num_tokens: int, expected_tokens: int, keys: list[bytes], spare_blocks: int
    ) -> int | None:
        spare = math.ceil(self.factor * spare_blocks)
        return super().admit(seq_index, num_tokens, expected_tokens, keys, spare)


def reserve_study(factor: float, num_blocks: int, num_seqs: int = 256, num_requests: int = 600) -> str:
    """Recomputed tokens and modelled time (8 ms a step plus 20 us a token) in a cache that is too small."""
    cache = ScaledReserve(num_blocks, BLOCK_SIZE, num_seqs, MAX_MODEL_LEN, share_prefixes=False)
    cache.factor = factor
    scheduler = Scheduler(make_config(num_seqs, 1, 0), cache)
    rng = np.random.default_rng(0)
    num_needed = num_computed = num_steps = 0
    for index in range(num_requests):
        prompt_len, output_len = (int(value) for value in rng.integers(64, 512, 2))
        num_needed += prompt_len + output_len - 1
        submit(scheduler, index, prompt_len, output_len)
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        assert plan is not None
        num_steps += 1
        num_computed += plan.num_tokens
        scheduler.apply(stub_result(plan), 0.0)
        scheduler.take_batches()
    seconds = num_steps * 8e-3 + num_computed * 20e-6
    return (
        f"{num_blocks:6d} blocks  reserve x {factor:<5} recomputed {100 * (num_computed / num_needed - 1):5.1f} %"
        f"   {scheduler.stats().num_preemptions:4d} preemptions   modelled {seconds:6.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--reserve", action="store_true")
    arguments = parser.parse_args()
    if arguments.reserve:
        for num_blocks in (2000, 600):
            for factor in (0, 0.25, 0.5, 1, 2):
                print(reserve_study(factor, num_blocks))
        return
    num_seqs = arguments.num_seqs
    for num_microbatches, lookahead in ((1, 0), (1, 1), (4, 0), (4, 1)):
        cache: CachePlanner = BlockPlanner(num_seqs * 256, BLOCK_SIZE, num_seqs, MAX_MODEL_LEN)
        times = steady_decoding(num_seqs, arguments.steps, num_microbatches, lookahead, cache)
        print(times.report(f"blocks, {num_microbatches} micro-batches, lookahead {lookahead}"))
    times = steady_decoding(num_seqs, arguments.steps, 1, 0, SlotPlanner(num_seqs, MAX_MODEL_LEN))
    print(times.report("fixed slots"))
    for share in (True, False):
        print(request_cost(num_seqs, 4 * num_seqs, 128, 128, share))


if __name__ == "__main__":
    main()
