"""The scheduler: requests in, step plans out, results in, deltas out."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from phalanx.parallel.errors import CapacityError, ConfigError, ExecutorError, RequestError
from phalanx.runtime.kv_cache import CachePlanner
from phalanx.runtime.request import FinishReason, Logprob, Request, TokenDelta
from phalanx.runtime.scheduler.admission import admission_row, make_sequence
from phalanx.runtime.scheduler.deltas import DeltaBatch
from phalanx.runtime.scheduler.plan_builder import PlannedStep, build_plan
from phalanx.runtime.scheduler.results import (
    GOES_ON,
    LENGTH,
    NOT_FINITE,
    STOP,
    logprob_at,
    outcomes,
    store_prompt_logprobs,
)
from phalanx.runtime.scheduler.sequences import Sequence, SequenceTable, SlotArray
from phalanx.runtime.scheduler.values import SchedulerConfig, SchedulerStats
from phalanx.runtime.scheduler.waiting import Deadlines, WaitingQueue
from phalanx.runtime.step import StepPlan, StepResult

__all__ = ["Scheduler"]

_FINISH_REASONS: dict[int, FinishReason] = {STOP: "stop", LENGTH: "length", NOT_FINITE: "error"}


class Scheduler:
    """In-flight batching with chunked prefill, preemption by recompute and pipeline micro-batches.

    A pure state machine: time is an argument (monotonic seconds), and the same calls give the same plans.
        First come, first
    served: the oldest request is admitted first and preempted last, so that every request ends.

    Slots and blocks of an ended or preempted sequence are free at once, even while a step that was already
    planned still reads and writes them. That is right because every rank runs steps in the order of their
    plans: the next owner's plan comes later, so its writes land on top, and it reads only positions that it
    wrote itself, or blocks whose tokens were all known and planned before they were offered for sharing.
    """

    def __init__(self, config: SchedulerConfig, cache: CachePlanner) -> None:
        if cache.num_slots < config.max_num_seqs:
            raise ConfigError(
                f"max_num_seqs={config.max_num_seqs} is above the cache's {cache.num_slots}; use the same"
            )
        self._config = config
        self._cache = cache
        self._table = SequenceTable(config.max_num_seqs, config.max_model_len, config.lookahead)
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._deadlines = Deadlines()
        self._in_flight: deque[PlannedStep] = deque()
        self._batches: list[DeltaBatch] = []
        self._num_submitted = 0
        self._num_planned = 0
        self._num_preemptions = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    def submit(self, request: Request, now: float) -> int:
        """Queue a request; returns its number, by which `DeltaBatch` knows it.

        Raises:
            RequestError: it could never run with these limits, or its id is in use.
            CapacityError: the queue is full.
        """
        self._end_overdue(now)
        if request.request_id in self._sequences:
            raise RequestError(f"request_id={request.request_id!r} is in use; choose another", "request_id")
        sequence = make_sequence(request, self._num_submitted, self._config, self._cache)
        if len(self._waiting) >= self._config.max_queued_requests:
            raise CapacityError(
                f"{len(self._waiting)} requests wait, max_queued_requests is "
                f"{self._config.max_queued_requests}; try again later"
            )
        self._num_submitted += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, sequence)
        if request.params.max_tokens == 0 and not sequence.lacks_prompt_logprobs:
            self._end(sequence, "length")
        return sequence.number

    def cancel(self, request_id: str, now: float) -> None:
        """End a request with finish reason ``cancelled``, at any moment of its life; unknown ids pass."""
        self._end_overdue(now)
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, "cancelled")

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None while nothing could be computed before another result is applied."""
        self._end_overdue(now)
        preemptions = self._num_preemptions
        decodes = self._choose_decodes()
        most_chunks = self._share(self._table.num_running + min(len(self._waiting), self._table.num_free))
        budget = self._config.max_num_batched_tokens - len(decodes)
        chunks = self._choose_chunks(most_chunks, budget)
        admissions: list[tuple[Any, ...]] = []
        if self._num_preemptions == preemptions:
            # Not beside a preemption: the blocks it freed are for those that run, or both would take turns
            # for ever.
            admissions = self._admit(chunks, most_chunks, budget - sum(count for _, count in chunks))
        if not len(decodes) and not chunks:
            return None
        return self._build(decodes, chunks, admissions)

    def apply(self, result: StepResult, now: float) -> None:
        """Take in the result of the oldest plan in flight.

        Raises:
            ExecutorError: it is another step's result, or of another size.
        """
        planned = self._take_planned(result)
        batch = DeltaBatch()
        self._batches.append(batch)
        self._apply_prompt_logprobs(planned, result)
        self._apply_tokens(planned, result, batch)
        self._end_overdue(now)

    def take_deltas(self) -> list[TokenDelta]:
        """What happened since the last call, one for each request and step, in order of steps."""
        return [delta for batch in self.take_batches() for delta in batch.objects()]

    def take_batches(self) -> list[DeltaBatch]:
        """The same as `take_deltas` in columns, one batch or more a step."""
        batches, self._batches = self._batches, []
        return batches

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended or any step is in flight."""
        return bool(self._sequences or self._in_flight)

    def stats(self) -> SchedulerStats:
        """Counts of now."""
        return SchedulerStats(
            num_running=self._table.num_running,
            num_waiting=len(self._waiting),
            kv_blocks_used=self._cache.num_blocks - self._cache.num_free_blocks,
            kv_blocks_total=self._cache.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
        )

    def _choose_decodes(self) -> SlotArray:
        """Slots that compute one token, with blocks for it; preempts the youngest while blocks are short."""
        while True:
            decodes = self._least_recent(np.flatnonzero(self._table.remaining() == 1))
            if self._cache.extend(decodes, self._table.num_computed[decodes]):
                return decodes
            self._preempt(self._table.youngest())

    def _least_recent(self, slots: SlotArray) -> SlotArray:
        """At most the token budget and a micro-batch's share, those first whose last turn is longest ago."""
        most = self._config.max_num_batched_tokens
        if self._config.num_microbatches > 1:
            most = min(most, self._share(self._table.num_decoding()))
        if len(slots) <= most:
            return slots
        return slots[np.argsort(self._table.last_turns[slots])[:most]]

    def _share(self, num_seqs: int) -> int:
        """Sequences of one micro-batch, so that there is work for all of them."""
        return -(-num_seqs // self._config.num_microbatches)

    def _choose_chunks(self, most: int, budget: int) -> list[tuple[int, int]]:
        """(slot, tokens) of prompts that are partly computed, the oldest request first."""
        remaining = self._table.remaining()
        slots = np.flatnonzero(remaining > 1)
        chunks: list[tuple[int, int]] = []
        for slot in slots[np.argsort(self._table.numbers[slots])].tolist():
            if budget <= 0 or len(chunks) >= most:
                break
            chunks.append((slot, min(int(remaining[slot]), budget)))
            budget -= chunks[-1][1]
        return chunks

    def _admit(self, chunks: list[tuple[int, int]], most: int, budget: int) -> list[tuple[Any, ...]]:
        """Start requests in order of arrival while slots, blocks and budget last; adds to ``chunks``."""
        admissions: list[tuple[Any, ...]] = []
        while self._waiting and self._table.num_free and budget > 0 and len(chunks) < most:
            sequence = self._waiting.first
            num_cached = self._reserve(sequence)
            if num_cached is None:
                break
            self._waiting.discard(sequence)
            self._table.add(sequence, num_cached)
            admissions.append(admission_row(sequence, sequence.slot, self._config.vocab_size))
            count = min(sequence.num_to_compute - num_cached, budget)
            chunks.append((sequence.slot, count))
            budget -= count
        return admissions

    def _reserve(self, sequence: Sequence) -> int | None:
        """Blocks for all known tokens in the next slot; returns how many are cached, None if it cannot be."""
        num_tokens = len(sequence.token_ids)
        self._cache.extend_keys(sequence.keys, sequence.token_ids)
        # Prompt log-probabilities need the logits of every prompt token, so these requests compute them all.
        keys = [] if sequence.lacks_prompt_logprobs else sequence.keys
        # One block of growth for each running sequence stays free. In a simulation of a cache 4 x too small that recomputed
        # 3 % of the tokens at the best total time; no reserve recomputed 36 %, twice the reserve ran too few sequences.
        spare_blocks = self._table.num_running
        num_cached = self._cache.admit(
            self._table.next_slot, num_tokens, sequence.target_length - 1, keys, spare_blocks
        )
        if num_cached is not None:
            self._prefix_query_tokens += num_tokens
            self._prefix_hit_tokens += num_cached
            if sequence.num_cached_tokens < 0:
                sequence.num_cached_tokens = num_cached
        return num_cached

    def _build(self, decodes: SlotArray, chunks: list[tuple[int, int]], admissions: list[tuple[Any, ...]]) -> StepPlan:
        plan, planned = build_plan(
            self._num_planned % 2**31, self._table, decodes, chunks, self._cache.take_new_blocks(), admissions
        )
        self._in_flight.append(planned)
        self._num_planned += 1
        for slot, _ in chunks:
            # Only now: a plan may share what earlier plans compute, never what it computes itself.
            sequence = self._table.sequences[slot]
            assert sequence is not None
            self._cache.mark_filled(slot, sequence.keys[: self._table.num_filled(slot) // self._cache.block_size])
        return plan

    def _preempt(self, slot: int) -> None:
        """Take a sequence's slot and blocks; all its tokens, generated ones too, will be computed again."""
        sequence = self._table.sequences[slot]
        assert sequence is not None, "a sequence alone always fits: larger ones were refused"
        sequence.token_ids = self._table.known_tokens(slot).copy()
        self._free(sequence)
        self._waiting.put_back(sequence)
        self._num_preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        """Give slot and blocks back; blocks whose tokens are known stay there for later prompts."""
        slot = sequence.slot
        filled = self._table.known_tokens(slot)[: self._table.num_filled(slot)]
        self._cache.extend_keys(sequence.keys, filled)
        self._cache.release(slot, sequence.keys[: len(filled) // self._cache.block_size])
        self._table.remove(slot)

    def _take_planned(self, result: StepResult) -> PlannedStep:
        planned = self._in_flight.popleft() if self._in_flight else None
        if planned is None or planned.step_id != result.step_id or len(planned.slots) != len(result.token_ids):
            expected = "no step is in flight"
            if planned is not None:
                expected = f"step {planned.step_id} with {len(planned.slots)} tokens is next"
            raise ExecutorError(
                f"got {len(result.token_ids)} tokens of step {result.step_id}, but {expected}; "
                "results must come in the order of plans"
            )
        return planned

    def _apply_tokens(self, planned: PlannedStep, result: StepResult, batch: DeltaBatch) -> None:
        table = self._table
        # Rows whose sequence ended or was preempted while the step was in flight are passed over.
        rows = np.flatnonzero(table.epochs[planned.slots] == planned.epochs)
        slots, token_ids = planned.slots[rows], result.token_ids[rows]
        lengths = table.append(slots, token_ids)
        codes = outcomes(table, slots, token_ids, lengths)
        first_news = table.has_first_news[slots] & (lengths == table.num_prompt[slots] + 1)
        special = (codes != GOES_ON) | table.wants_logprobs[slots] | first_news
        plain = np.flatnonzero(~special)
        plain_slots = slots[plain]
        batch.request_ids = table.request_ids[plain_slots]
        batch.numbers = table.numbers[plain_slots]
        batch.token_ids = token_ids[plain]
        for i in np.flatnonzero(special).tolist():
            sequence = table.sequences[slots[i]]
            assert sequence is not None
            self._apply_special(sequence, result, int(rows[i]), int(codes[i]), bool(first_news[i]))

    def _apply_special(self, sequence: Sequence, result: StepResult, row: int, code: int, first_news: bool) -> None:
        """A token that ends its request, has log-probabilities, or is the first and has more to tell."""
        if code == NOT_FINITE:
            self._fail(sequence)
            return
        params = sequence.request.params
        token_id = int(result.token_ids[row])
        delta = TokenDelta(
            sequence.request.request_id,
            (token_id,),
            logprobs=() if params.logprobs is None else (logprob_at(result, row, token_id, params.logprobs),),
            prompt_logprobs=_all_prompt_logprobs(sequence) if first_news else None,
            finish_reason=_FINISH_REASONS.get(code),
            stop_reason=token_id if code == STOP and token_id in params.stop_token_ids else None,
            num_cached_tokens=sequence.num_cached_tokens if first_news else 0,
        )
        if delta.finish_reason is not None:
            self._forget(sequence)
        self._emit(delta)

    def _apply_prompt_logprobs(self, planned: PlannedStep, result: StepResult) -> None:
        for sequence, are_numbers in store_prompt_logprobs(self._table, planned, result):
            if not are_numbers:
                self._fail(sequence)
            elif sequence.request.params.max_tokens == 0 and not sequence.lacks_prompt_logprobs:
                self._end(sequence, "length")

    def _end_overdue(self, now: float) -> None:
        for sequence in self._deadlines.take_overdue(now):
            if self._sequences.get(sequence.request.request_id) is sequence:
                self._end(
                    sequence,
                    "error",
                    "the deadline passed; allow more time (--request-timeout) or ask for less",
                )

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose numbers are broken, and let nobody share what it left in the cache."""
        self._cache.discard(sequence.slot)
        position = int(self._table.num_known[sequence.slot])
        self._table.remove(sequence.slot)
        self._end(
            sequence,
            "error",
            f"the model's output was not finite near position {position}; the checkpoint or its dtype cannot "
            "represent this input (try --dtype float32)",
        )

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a request without another token."""
        scored = reason == "length"  # asked for no tokens, and has what it asked for
        self._forget(sequence)
        self._emit(
            TokenDelta(
                sequence.request.request_id,
                prompt_logprobs=_all_prompt_logprobs(sequence) if scored else None,
                finish_reason=reason,
                num_cached_tokens=max(sequence.num_cached_tokens, 0) if scored else 0,
                error=error,
            )
        )

    def _forget(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._free(sequence)
        else:
            self._waiting.discard(sequence)
        del self._sequences[sequence.request.request_id]

    def _emit(self, delta: TokenDelta) -> None:
        if not self._batches:
            self._batches.append(DeltaBatch())
        self._batches[-1].deltas.append(delta)


def _all_prompt_logprobs(sequence: Sequence) -> tuple[Logprob | None, ...] | None:
    return None if sequence.prompt_logprobs is None else tuple(sequence.prompt_logprobs)
