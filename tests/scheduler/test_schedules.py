"""Any schedule of requests, cancellations, deadlines and delays: every request gets its own tokens, and nothing is left over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.runtime.config import SchedulingPolicy
from phalanx.runtime.kv_cache import BlockPlanner, CachePlanner, SlotPlanner
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.scheduler import SchedulerConfig
from phalanx.runtime.step.times import StepTimes

from .simulation import NUM_TOP, VOCAB_SIZE, Driver, Truth, all_logprobs
from .test_beam_search import plain_search

EOS = (3, 7)
MAX_MODEL_LEN = 24


@dataclass(frozen=True)
class Schedule:
    """One random life of a scheduler; everything below the sizes is drawn from ``seed``."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_microbatches: int
    step_times: StepTimes | None
    lookahead: int
    block_size: int
    extra_blocks: int
    paged: bool
    num_requests: int
    disturbed: bool
    seed: int
    policy: SchedulingPolicy = "fcfs"

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            MAX_MODEL_LEN,
            max_queued_requests=100,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS,
            policy=self.policy,
            num_microbatches=self.num_microbatches,
            lookahead=self.lookahead,
            step_times=self.step_times,
        )

    def cache(self) -> CachePlanner:
        if not self.paged:
            return SlotPlanner(self.max_num_seqs, MAX_MODEL_LEN)
        num_blocks = -(-MAX_MODEL_LEN // self.block_size) + self.extra_blocks
        return BlockPlanner(num_blocks, self.block_size, self.max_num_seqs, MAX_MODEL_LEN)


# Planning takes 0.15 ms, so that these make any number from stages to the most of them the best one.
milliseconds = st.tuples(*[st.sampled_from([0.0, 2e-4, 1e-3, 4e-3])] * 3)
step_times = st.builds(StepTimes, st.integers(1, 4), st.just((1, 2, 4)), milliseconds, milliseconds)

schedules = st.builds(
    Schedule,
    max_num_seqs=st.integers(1, 7),
    max_num_batched_tokens=st.integers(1, 30),
    num_microbatches=st.integers(1, 4),
    step_times=st.none() | step_times,
    lookahead=st.integers(0, 1),
    block_size=st.integers(1, 6),
    extra_blocks=st.integers(0, 12),
    paged=st.sampled_from([True, True, True, False]),
    num_requests=st.integers(1, 14),
    disturbed=st.booleans(),
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["fcfs", "fcfs", "priority"]),
)


def draw_truths(schedule: Schedule, random: Random) -> list[Truth]:
    """Requests that often share a prefix, so that blocks are shared, with every parameter that changes how they end."""
    shared = [random.randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)]
    truths = []
    for index in range(schedule.num_requests):
        num_prompt = random.randint(1, MAX_MODEL_LEN - 1)
        num_shared = random.choice((0, num_prompt // 2, num_prompt))
        tail = [random.randrange(VOCAB_SIZE) for _ in range(num_prompt - num_shared)]
        max_tokens = random.randint(0, MAX_MODEL_LEN - num_prompt)
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=index,
            stop_token_ids=tuple(random.sample(range(VOCAB_SIZE), random.choice((0, 0, 2)))),
            ignore_eos=random.random() < 0.5,
            min_tokens=random.randint(0, max_tokens) if random.random() < 0.3 else 0,
            logprobs=random.randint(0, NUM_TOP) if random.random() < 0.2 else None,
            prompt_logprobs=random.randint(0, NUM_TOP) if random.random() < 0.2 else None,
        )
        deadline = random.randint(1, 40) if schedule.disturbed and random.random() < 0.2 else None
        nan_at = random.randint(num_prompt, MAX_MODEL_LEN) if random.random() < 0.1 else None
        prompt, fork_from, salt = (*shared[:num_shared], *tail), None, random.choice(("", "", "salt"))
        priority = random.randint(-2, 2) if schedule.policy == "priority" else 0
        if truths and random.random() < 0.3:
            first = random.choice(truths).request
            room = MAX_MODEL_LEN - len(first.prompt_token_ids)
            if params.max_tokens <= room:
                prompt, fork_from, salt = first.prompt_token_ids, first.request_id, first.cache_salt
                priority = first.priority
                nan_at = None
        request = Request(f"r{index}", prompt, params, deadline, fork_from, salt, priority)
        truths.append(Truth(request, nan_at))
        if random.random() < 0.2:
            truths[-1] = Truth(replace(request, params=masked(params, random), fork_from=None), nan_at)
        elif random.random() < 0.2:
            truths += draw_search(schedule, random, request, nan_at)
    return truths


def masked(params: SamplingParams, random: Random) -> SamplingParams:
    """The same with a mask: one for all tokens, or one after the other, which may fail."""
    if random.random() < 0.3:
        return replace(params, allowed_token_ids=tuple(sorted(random.sample(range(VOCAB_SIZE), 5))))
    return replace(params, structured_outputs={"regex": random.choice(("never", "never", "0", "2"))}, min_tokens=0)


def draw_search(schedule: Schedule, random: Random, request: Request, nan_at: int | None) -> list[Truth]:
    """A beam search after a request's prompt, and requests that share its answers; none where it would not fit."""
    width = random.randint(2, 5)
    num_tokens = len(request.prompt_token_ids) + max(1, request.params.max_tokens)
    blocks = width * -(-num_tokens // schedule.block_size)
    if width > schedule.max_num_seqs or blocks > -(-MAX_MODEL_LEN // schedule.block_size) + schedule.extra_blocks:
        return []
    params = replace(
        request.params, beam_width=width, seed=1000 + int(request.request_id[1:]), length_penalty=random.choice((0.0, 1.0, 2.0)),
        early_stopping=random.choice((False, True, "never")), max_tokens=max(1, request.params.max_tokens), min_tokens=0,
    )  # fmt: skip
    leader = replace(request, request_id=f"{request.request_id}-0", params=params, fork_from=None)
    others = [
        replace(leader, request_id=f"{request.request_id}-{index}", fork_from=leader.request_id)
        for index in range(1, random.randint(1, width))
    ]
    return [Truth(one, nan_at) for one in (leader, *others)]


def run(schedule: Schedule) -> Driver:
    """Submit, plan, collect, cancel and let time pass in random order, then run to the end."""
    random = Random(schedule.seed)
    truths = draw_truths(schedule, random)
    driver = Driver(schedule.config, schedule.cache(), truths)
    to_submit = [truth.request for truth in truths]
    while to_submit:
        act = random.random()
        if act < 0.4:
            driver.submit(to_submit.pop(0))
            while (
                to_submit and to_submit[0].params.beam_width > 1 and to_submit[0].fork_from and not schedule.disturbed
            ):
                driver.submit(to_submit.pop(0))
        elif act < 0.7:
            driver.plan()
        elif act < 0.92:
            driver.collect()
        elif schedule.disturbed and act < 0.96 and driver.live:
            driver.cancel(random.choice(driver.live))
        elif schedule.disturbed:
            driver.now += random.randint(0, 10)
    if schedule.disturbed:
        for _ in range(random.randint(0, 10)):
            driver.plan() or driver.collect()
        for request_id in random.sample(driver.live, len(driver.live) // 3):
            driver.cancel(request_id)
    driver.drain()
    return driver


def check_outputs(driver: Driver) -> None:
    for request_id, truth in driver.truths.items():
        deltas = driver.deltas[request_id]
        tokens = driver.tokens(request_id)
        last = deltas[-1]
        if truth.is_search:
            check_search(driver, truth)
            continue
        expected, reason, stop_reason = truth.expected(EOS)
        assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
        if last.finish_reason == "cancelled" or (last.error and "deadline" in last.error):
            assert tokens == expected[: len(tokens)]
            continue
        assert (tokens, last.finish_reason, last.stop_reason) == (expected, reason, stop_reason)
        assert (last.error is not None) == (reason == "error")
        check_logprobs(driver, truth)


def check_search(driver: Driver, truth: Truth) -> None:
    """One answer or an error, after the definition written out plainly."""
    request, params = truth.request, truth.request.params
    (delta,) = driver.deltas[request.request_id]
    leader = request.fork_from or request.request_id
    if delta.finish_reason == "cancelled" or (delta.error and "deadline" in delta.error):
        assert delta.token_ids == ()
        return
    if delta.error is not None:
        assert truth.nan_at is not None
        assert "not finite" in delta.error
        assert "--dtype bfloat16" in delta.error
        return
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    answers = plain_search(lambda tokens: all_logprobs((*request.prompt_token_ids, *tokens)), params, ends)
    assert delta.token_ids == answers[driver.followers[leader].index(request.request_id)]
    if request.request_id == leader:
        assert [hypothesis.token_ids for hypothesis in delta.hypotheses] == answers
    assert delta.prompt_logprobs == truth.expected_prompt_logprobs()


def check_logprobs(driver: Driver, truth: Truth) -> None:
    deltas = driver.deltas[truth.request.request_id]
    params = truth.request.params
    given = [entry for delta in deltas for entry in delta.logprobs]
    num_tokens = sum(len(delta.token_ids) for delta in deltas)
    if params.logprobs is None:
        assert given == []
    else:
        assert given == truth.expected_logprobs(num_tokens)
    prompts = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    if params.prompt_logprobs is None or deltas[-1].error is not None:
        assert len(prompts) <= (params.prompt_logprobs is not None)
    else:
        assert prompts == [truth.expected_prompt_logprobs()]
        assert deltas[0].prompt_logprobs is not None


def check_nothing_left(driver: Driver) -> None:
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
    cache = driver.executor.cache
    assert cache.num_free_blocks == cache.num_blocks
    if isinstance(cache, BlockPlanner):
        most = min(cache.max_tokens_per_seq, cache.num_blocks * cache.block_size)
        assert cache.admit(0, most, most, [], 0) == 0, "all blocks can be given out again"
        blocks = cache.block_table(0).tolist()
        assert len(set(blocks)) == len(blocks) == -(-most // cache.block_size)


@settings(max_examples=900, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules)
def test_every_request_gets_its_own_tokens_and_nothing_is_left_over(schedule: Schedule) -> None:
    driver = run(schedule)
    check_outputs(driver)
    check_nothing_left(driver)


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules)
def test_same_input_gives_same_plans(schedule: Schedule) -> None:
    first, second = run(schedule), run(schedule)
    assert first.plans == second.plans
    assert first.deltas == second.deltas


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules, st.integers(1, 4), st.none() | step_times, st.integers(0, 1), st.integers(1, 30))
def test_tokens_do_not_depend_on_the_schedule(
    schedule: Schedule, num_microbatches: int, times: StepTimes | None, lookahead: int, max_num_batched_tokens: int
) -> None:
    schedule = replace(schedule, disturbed=False)
    other = replace(
        schedule,
        num_microbatches=num_microbatches,
        step_times=times,
        lookahead=lookahead,
        max_num_batched_tokens=max_num_batched_tokens,
        paged=not schedule.paged,
    )
    first, second = run(schedule), run(other)
    assert first.deltas.keys() == second.deltas.keys()
    for request_id in first.deltas:
        assert first.tokens(request_id) == second.tokens(request_id)
        assert first.deltas[request_id][-1].finish_reason == second.deltas[request_id][-1].finish_reason
