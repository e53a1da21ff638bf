"""An executor made of token ids: its cache holds tokens, its model is a hash of the prefix read back from that cache.

It checks every plan against the rules that real executors rely on, and every token that it reads against the only sequence
that the request can produce, so that a wrong block, position or token shows up in the step that makes it.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import RequestError
from phalanx.runtime.kv_cache import BlockPlanner, CachePlanner
from phalanx.runtime.request import Logprob, Request, TokenDelta
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.sampling.masks import pack_mask
from phalanx.runtime.scheduler import Scheduler, SchedulerConfig
from phalanx.runtime.step import PENDING_TOKEN, BatchState, RowKind, StepPlan, StepResult

VOCAB_SIZE = 29
NUM_TOP = 4


def next_token(prefix: list[int], seed: int, allowed: Sequence[int] = range(VOCAB_SIZE)) -> int:
    """The token that the simulated model samples after a prefix."""
    return allowed[zlib.crc32(repr((prefix, seed)).encode()) % len(allowed)]


def all_logprobs(prefix: Sequence[int]) -> list[float]:
    """Its log-probabilities of all tokens after a prefix."""
    state = zlib.crc32(repr(tuple(prefix)).encode())
    return [-float(zlib.crc32(bytes((token,)), state) % 1000) for token in range(VOCAB_SIZE)]


def top_logprobs(prefix: Sequence[int]) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, the most probable first."""
    return sorted(enumerate(all_logprobs(prefix)), key=lambda pair: -pair[1])


def allowed_after(generated: Sequence[int]) -> list[int]:
    """What a guide of the simulation lets follow: another quarter of the vocabulary after each token."""
    part = zlib.crc32(repr(tuple(generated)).encode()) % 4
    return [token for token in range(VOCAB_SIZE) if token % 4 == part]


class LateMask:
    """A `TokenMask` of `allowed_after` that is ready a few looks later; after ``fails_after`` tokens there is none."""

    follows_tokens = True

    def __init__(self, fails_after: int | None) -> None:
        self._fails_after, self._tokens, self._delay = fails_after, list[int](), 0

    @property
    def is_ready(self) -> bool:
        self._delay -= 1
        return self._delay < 0 and self.problem is None

    @property
    def problem(self) -> str | None:
        return None if self._fails_after is None or len(self._tokens) < self._fails_after else "nothing can follow"

    def wait(self, seconds: float) -> None:
        self._delay = 0

    def words(self) -> NDArray[np.int32]:
        assert self.is_ready
        return pack_mask(allowed_after(self._tokens), VOCAB_SIZE)

    def accept(self, token_id: int) -> None:
        self._tokens.append(token_id)
        self._delay = sum(self._tokens) % 5


class LateMasks:
    """`GuideMasks` whose guides say after how many tokens their masks fail."""

    def start(self, guide: Guide) -> LateMask:
        return LateMask(int(guide.text) if guide.text != "never" else None)


@dataclass
class Truth:
    """A request and the tokens that it yields whatever runs beside it; ``nan_at``: length whose logits are not finite."""

    request: Request
    nan_at: int | None = None
    token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        for _ in range(self.request.params.max_tokens):
            allowed = self.allowed(len(self.token_ids))
            self.token_ids.append(next_token(self.token_ids, self.request.params.seed or 0, allowed))

    def allowed(self, length: int) -> Sequence[int]:
        """Tokens that may follow the first ``length`` tokens."""
        params = self.request.params
        if params.structured_outputs is not None:
            return allowed_after(self.token_ids[self.num_prompt : length])
        return range(VOCAB_SIZE) if params.allowed_token_ids is None else params.allowed_token_ids

    @property
    def is_masked(self) -> bool:
        return self.request.params.structured_outputs is not None or self.request.params.allowed_token_ids is not None

    @property
    def is_search(self) -> bool:
        return self.request.params.beam_width > 1

    def mask_fails(self, num_generated: int) -> bool:
        guide = self.request.params.structured_outputs
        return guide is not None and guide.text != "never" and num_generated >= int(guide.text)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    def sample(self, length: int) -> int:
        """The token after the first ``length`` tokens, as the executor returns it."""
        return -1 if self.nan_at is not None and length >= self.nan_at else self.token_ids[length]

    def expected(self, eos_token_ids: tuple[int, ...]) -> tuple[list[int], str, int | None]:
        """Generated tokens, finish reason and stop reason of a request that nobody disturbs."""
        params = self.request.params
        generated: list[int] = []
        for index in range(params.max_tokens):
            if self.mask_fails(index):
                return generated, "error", None
            token = self.sample(self.num_prompt + index)
            if token < 0:
                return generated, "error", None
            generated.append(token)
            if index >= params.min_tokens:
                if token in params.stop_token_ids:
                    return generated, "stop", token
                if token in eos_token_ids and (not params.ignore_eos or params.structured_outputs is not None):
                    return generated, "stop", None
        return generated, "length", None

    def expected_logprobs(self, num_tokens: int) -> list[Logprob]:
        most = self.request.params.logprobs or 0
        ends = range(self.num_prompt, self.num_prompt + num_tokens)
        return [expected_logprob(self.token_ids[:end], self.token_ids[end], most) for end in ends]

    def expected_prompt_logprobs(self) -> tuple[Logprob | None, ...] | None:
        most = self.request.params.prompt_logprobs
        if most is None:
            return None
        prompt = self.token_ids[: self.num_prompt]
        return (None, *(expected_logprob(prompt[:i], token, most) for i, token in enumerate(prompt) if i))


def expected_logprob(prefix: list[int], token: int, most: int) -> Logprob:
    return Logprob(token, all_logprobs(prefix)[token], tuple(top_logprobs(prefix)[:most]))


@dataclass
class Tenancy:
    """One stay of a request in a seq_index; ``next_position`` is what the next plan must compute first."""

    truth: Truth
    next_position: int | None = None
    last_sampled: int | None = None

    def expects(self, tokens: list[int], start: int) -> bool:
        """Whether these are the request's own tokens; of a beam, which may go any way, those of the prompt are known."""
        known = self.truth.token_ids[: self.truth.num_prompt] if self.truth.is_search else self.truth.token_ids
        return all(token == own for token, own in zip(tokens, known[start:], strict=False))


class SimulatedExecutor:
    """Runs plans at once, in order; the driver decides when the leader sees a result."""

    num_saturated = 0

    def __init__(self, config: SchedulerConfig, cache: CachePlanner, truths: list[Truth]) -> None:
        self.config = config
        self.cache = cache
        self.truth_of_seed = {truth.request.params.seed: truth for truth in reversed(truths)}  # of a search, its leader
        blocks_per_seq = -(-config.max_model_len // cache.block_size)
        self.state = BatchState.empty(config.max_num_seqs, blocks_per_seq)
        self.contents = np.full((cache.num_blocks, cache.block_size), -9, np.int32)
        self.tenancies: dict[int, Tenancy] = {}
        self.unseen_samples: deque[list[Tenancy]] = deque()
        self.results: deque[StepResult] = deque()

    def execute(self, plan: StepPlan) -> None:
        plan = StepPlan.unpack(plan.words.copy())
        self._check_shape(plan)
        self._admit(plan)
        self.state.apply(plan)
        self._copy(plan)
        self._write(plan)
        self.results.append(self._compute(plan))
        self.unseen_samples.append(
            [self.tenancies[seq_index] for seq_index in plan.seq_indices[plan.sampling_seqs].tolist()]
        )

    def collect(self) -> StepResult:
        self.unseen_samples.popleft()
        return self.results.popleft()

    def _check_shape(self, plan: StepPlan) -> None:
        config = self.config
        seq_indices = plan.seq_indices.tolist()
        num_scheduled_tokens = plan.num_scheduled_tokens.tolist()
        assert 0 < len(seq_indices) == len(set(seq_indices)) <= config.max_num_seqs
        assert min(num_scheduled_tokens) >= 1
        assert sum(num_scheduled_tokens) == plan.num_tokens <= config.max_num_batched_tokens
        assert num_scheduled_tokens == sorted(num_scheduled_tokens, key=lambda count: count > 1), (
            "sequences with one token come first"
        )
        assert plan.num_decodes == num_scheduled_tokens.count(1)
        places = [(seq_index, index) for _, seq_index, index, _ in plan.new_blocks.tolist()]
        assert len(places) == len(set(places)), "ranks apply new blocks in any order"
        started = plan.admissions["seq_index"].tolist()
        assert len(started) == len(set(started))
        assert {seq_index for seq_index, _ in places} <= set(seq_indices) | set(started)

    def _admit(self, plan: StepPlan) -> None:
        starts = dict(zip(plan.seq_indices.tolist(), plan.starts.tolist(), strict=True))
        for row in plan.admissions:
            seq_index = int(row["seq_index"])
            start = starts.get(seq_index)  # None: it takes over blocks now and computes in a later plan
            assert not start or start % self.cache.block_size == 0 or len(plan.copies), (
                "a block is shared whole or copied"
            )
            self.tenancies[seq_index] = Tenancy(self.truth_of_seed[int(row["seed"])], start)

    def _copy(self, plan: StepPlan) -> None:
        group, source, destination = plan.copies.T
        assert not group.any()
        assert set(source.tolist()).isdisjoint(destination.tolist())
        self.contents[destination] = self.contents[source]

    def _write(self, plan: StepPlan) -> None:
        """Put the input tokens into the cache, all sequences before any of them reads, as executors do."""
        token_ids = plan.token_ids.tolist()
        row = 0
        for seq_index, start, count in zip(
            *(a.tolist() for a in (plan.seq_indices, plan.starts, plan.num_scheduled_tokens)), strict=True
        ):
            tenancy = self.tenancies[seq_index]
            assert tenancy.next_position in (start, None), "every position is computed once and in order"
            tenancy.next_position = start + count
            tokens = token_ids[row : row + count]
            row += count
            if tokens[0] == PENDING_TOKEN:
                unseen = sum(tenancy is other for step in self.unseen_samples for other in step)
                assert self.config.lookahead >= unseen == 1, "only a token in flight is pending"
                assert tenancy.last_sampled is not None
                tokens = [tenancy.last_sampled]
            if tokens != [-1]:  # what a NaN row sampled; its request ends when the leader sees it
                assert tenancy.expects(tokens, start)
            positions = np.arange(start, start + count)
            blocks = self.state.block_tables[0, seq_index, positions // self.cache.block_size]
            self._check_sole_owner(seq_index, set(blocks.tolist()))
            self.contents[blocks, positions % self.cache.block_size] = tokens

    def _check_sole_owner(self, seq_index: int, written: set[int]) -> None:
        if not isinstance(self.cache, BlockPlanner):
            return
        for other in range(self.config.max_num_seqs):
            held = self.cache.block_table(other).tolist()
            if other == seq_index:
                assert written <= set(held)
            else:
                assert written.isdisjoint(held), "a step writes only blocks that its sequence has to itself"

    def _read(self, seq_index: int, length: int) -> list[int]:
        size = self.cache.block_size
        blocks = self.state.block_tables[0, seq_index, : -(-length // size)]
        tokens: list[int] = self.contents[blocks].ravel()[:length].tolist()
        return tokens

    def _compute(self, plan: StepPlan) -> StepResult:
        assert plan.kinds.tolist() == sorted(plan.kinds.tolist())
        scored: list[tuple[list[int], int]] = []
        seqs = plan.cu_seqlens.searchsorted(plan.rows, "right") - 1
        masks = plan.row_masks
        for row, kind, target, seq in zip(
            *(column.tolist() for column in (plan.rows, plan.kinds, plan.targets, seqs)), strict=True
        ):
            seq_index, length = int(plan.seq_indices[seq]), int(plan.positions[row]) + 1
            tenancy = self.tenancies[seq_index]
            prefix = self._read(seq_index, length)
            if prefix[-1] != -1:
                assert tenancy.expects(prefix, 0), "the block table leads to the sequence's own tokens"
            if kind == RowKind.SAMPLE:
                target = self._sample(tenancy.truth, prefix, masks.pop(len(scored), None))
                tenancy.last_sampled = target
            scored.append((prefix, target))
        assert not masks, "only rows that sample have masks"
        return self._result(plan, scored)

    def _sample(self, truth: Truth, prefix: list[int], mask: NDArray[np.int32] | None) -> int:
        length = len(prefix)
        if truth.is_search:
            return -1 if truth.nan_at is not None and length >= truth.nan_at else 0
        assert (mask is not None) == truth.is_masked
        if mask is not None and prefix[-1] != -1:
            assert mask.tolist() == pack_mask(truth.allowed(length), VOCAB_SIZE).tolist()
        is_finite = truth.sample(length) >= 0
        return next_token(prefix, truth.request.params.seed or 0, truth.allowed(length)) if is_finite else -1

    def _result(self, plan: StepPlan, scored: list[tuple[list[int], int]]) -> StepResult:
        """As many log-probabilities and alternatives as anybody in the step asked for."""
        token_ids = np.array([token for _, token in scored], np.int32)
        asked = [*self.state.sampling["num_logprobs"][plan.seq_indices].tolist()]
        if plan.num_sampled < len(plan.rows):
            asked.append(plan.num_alternatives)
        k = max(asked)
        if k < 0:
            return StepResult(plan.step_id, token_ids)
        tops = [top_logprobs(prefix)[:k] for prefix, _ in scored]
        return StepResult(
            plan.step_id,
            token_ids,
            np.array([all_logprobs(prefix)[token] for prefix, token in scored], np.float32),
            np.array([[token for token, _ in top] for top in tops], np.int32).reshape(len(scored), k),
            np.array([[value for _, value in top] for top in tops], np.float32).reshape(len(scored), k),
        )


class Driver:
    """Scheduler and simulated executor with a log of what each request got."""

    def __init__(self, config: SchedulerConfig, cache: CachePlanner, truths: list[Truth]) -> None:
        self.config = config
        self.scheduler = Scheduler(config, cache, LateMasks())
        self.executor = SimulatedExecutor(config, cache, truths)
        self.truths = {truth.request.request_id: truth for truth in truths}
        self.depth = config.num_microbatches + config.lookahead
        self.num_in_flight = 0
        self.now = 0.0
        self.plans: list[bytes] = []
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.followers: dict[str, list[str]] = {}
        self.live: list[str] = []
        self.overdue_for = 0
        self.begun_searches: set[str] = set()

    def submit(self, request: Request) -> None:
        try:
            self.scheduler.submit(request, self.now)
        except RequestError:
            self._log()
            assert request.params.beam_width > 1, "only a follower can come too late"
            assert request.fork_from not in (None, *self.live)
            del self.truths[request.request_id]
            return
        if request.params.beam_width > 1:
            self.followers.setdefault(request.fork_from or request.request_id, []).append(request.request_id)
        place = bisect_right(self.live, request.priority, key=lambda name: self.truths[name].request.priority)
        if place == 0:
            self.overdue_for = 0
        self.live.insert(place, request.request_id)
        self.deltas[request.request_id] = []
        self._log()

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id, self.now)
        self._log()

    def plan(self) -> bool:
        if self.num_in_flight >= self.depth:
            return False
        plan = self.scheduler.plan(self.now)
        self._log()
        if plan is None:
            waits = any(self.truths[name].request.params.structured_outputs is not None for name in self.live)
            assert self.num_in_flight or waits or not self.live, (
                "something can always be planned when nothing is in flight"
            )
            if not self.num_in_flight:
                self.scheduler.wait_for_masks(0.0)
            return False
        self.executor.execute(plan)
        self.plans.append(plan.words.tobytes())
        self.num_in_flight += 1
        self._check_first(plan)
        return True

    def collect(self) -> bool:
        if not self.num_in_flight:
            return False
        self.num_in_flight -= 1
        self.scheduler.apply(self.executor.collect(), self.now)
        self._log()
        return True

    def drain(self, most_steps: int = 10_000) -> None:
        """Run to the end as the engine does."""
        while self.scheduler.has_work:
            while self.plan():
                pass
            self.collect()
            most_steps -= 1
            assert most_steps > 0, "the schedule does not end"

    def _check_first(self, plan: StepPlan) -> None:
        """The first request in order is part of a plan at least this often, or it waits and no later one starts.

        It may wait as long as later ones run: they came before it, or passed it while another computed its prompt, or while its mask
        was not there, and they keep what they have. As none joins them, it starts when they end. Beams of a search that has begun are
        no new requests.
        """
        if not self.live:
            return
        first = self.truths[self.live[0]]
        of_plan, started = (
            [self.executor.tenancies[seq_index].truth for seq_index in column.tolist()]
            for column in (plan.seq_indices, plan.admissions["seq_index"])
        )
        if first in of_plan or first.request.params.structured_outputs is not None:
            self.overdue_for = 0
        elif (
            any(truth.request.request_id not in self.begun_searches for truth in started)
            or not self.scheduler.stats().num_waiting
        ):
            self.overdue_for += 1
        self.begun_searches |= {truth.request.request_id for truth in started if truth.is_search}
        rounds = -(-self.config.max_num_seqs // self.config.max_num_batched_tokens)
        assert self.overdue_for <= rounds + self.depth + 1

    def _log(self) -> None:
        for delta in self.scheduler.take_deltas():
            log = self.deltas[delta.request_id]
            assert not log or log[-1].finish_reason is None, "a request ends once"
            log.append(delta)
            if delta.finish_reason is not None:
                if self.live[0] == delta.request_id:
                    self.overdue_for = 0
                self.live.remove(delta.request_id)

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas[request_id] for token in delta.token_ids]
