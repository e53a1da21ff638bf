# SPDX-License-Identifier: Apache-2.0
"""The scheduler: requests in, step plans out, results in, deltas out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from phalanx.parallel.errors import CapacityError, ConfigError, ExecutorError, RequestError
from phalanx.runtime.kv_cache import CachePlanner
from phalanx.runtime.request import FinishReason, Hypothesis, Logprob, Request, TokenDelta
from phalanx.runtime.sampling.masks import GuideMasks
from phalanx.runtime.scheduler.admission import make_mask, make_sequence, num_alternatives
from phalanx.runtime.scheduler.beams import BeamGroup
from phalanx.runtime.scheduler.deltas import DeltaBatch
from phalanx.runtime.scheduler.plan_builder import CacheChanges, PlannedStep, build_plan
from phalanx.runtime.scheduler.results import (
    GOES_ON,
    LENGTH,
    NOT_FINITE,
    STOP,
    logprob_at,
    outcomes,
    store_prompt_logprobs,
)
from phalanx.runtime.scheduler.running_set import RunningSet
from phalanx.runtime.scheduler.sequences import Int32Array, PromptGroup, SeqIndexArray, Sequence, SequenceTable
from phalanx.runtime.scheduler.values import SchedulerConfig, SchedulerStats
from phalanx.runtime.scheduler.waiting import Deadlines, WaitingQueue
from phalanx.runtime.step import StepPlan, StepResult
from phalanx.runtime.text import TextStream

__all__ = ["Scheduler"]

_FINISH_REASONS: dict[int, FinishReason] = {STOP: "stop", LENGTH: "length", NOT_FINITE: "error"}


class Scheduler:
    """In-flight batching with chunked prefill, preemption by recompute and pipeline micro-batches.

    A pure state machine: time is an argument (monotonic seconds), and the same calls give the same plans.

    Rows and blocks of an ended or preempted sequence are free at once, even while a step that was already
    planned still reads and writes them. That is right because every rank runs steps in the order of their
    plans: the next owner's plan comes later, so its writes land on top, and it reads only positions that it
    wrote itself, or blocks whose tokens were all known and planned before they were offered for sharing.

    Args:
        guides: starts the masks of guided requests.
        texts: begins the text of an answer, for beam searches with stop texts; those of other requests are found where text is made.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CachePlanner,
        guides: GuideMasks | None = None,
        texts: Callable[[Request], TextStream | None] | None = None,
    ) -> None:
        if cache.max_num_seqs < config.max_num_seqs:
            raise ConfigError(
                f"max_num_seqs={config.max_num_seqs} is above the cache's {cache.max_num_seqs}; use the same"
            )
        self._config = config
        self._cache = cache
        self._guides, self._texts = guides, texts
        self._table = SequenceTable(config.max_num_seqs, config.max_model_len, config.lookahead)
        self._waiting = WaitingQueue()
        self._running = RunningSet(config, cache, self._table, self._waiting)
        self._sequences: dict[str, Sequence] = {}
        self._searches: dict[str, BeamGroup] = {}
        self._deadlines = Deadlines()
        self._in_flight: deque[PlannedStep] = deque()
        self._batches: list[DeltaBatch] = []
        self._num_submitted = 0
        self._num_planned = 0

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
        if request.params.beam_width > 1 and request.fork_from is not None:
            return self._follow(sequence, request.fork_from)
        if len(self._waiting) >= self._config.max_queued_requests:
            raise CapacityError(
                f"{len(self._waiting)} requests are waiting, the most that --max-queued-requests="
                f"{self._config.max_queued_requests} allows; try again later"
            )
        self._join_group(sequence)
        sequence.mask = make_mask(request.params, self._config, self._guides)
        self._num_submitted += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        if sequence.is_beam:
            text = self._texts(request) if self._texts is not None and request.params.stop else None
            self._searches[request.request_id] = BeamGroup.start(sequence, self._running.beams, text)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, sequence)
        if request.params.max_tokens == 0 and not sequence.lacks_prompt_logprobs:
            self._end(sequence, "length")
        return sequence.number

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never run with these limits; it is not queued."""
        make_sequence(request, 0, self._config, self._cache)

    def cancel(self, request_id: str, now: float) -> None:
        """End a request with finish reason ``cancelled``, at any moment of its life; unknown ids are ignored."""
        self._end_overdue(now)
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, "cancelled")

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None while nothing can be computed, or is better not, before another result is applied."""
        self._end_overdue(now)
        if self._table.masks or self._waiting.masked:
            self._end_without_mask()
        selection = self._running.select(len(self._in_flight))
        if not selection.num_tokens:
            return None
        step_id = self._num_planned % 2**31
        plan, planned = build_plan(step_id, self._table, selection, self._take_cache_changes())
        self._running.mark_filled(selection.chunks)
        self._in_flight.append(planned)
        self._num_planned += 1
        return plan

    def apply(self, result: StepResult, now: float) -> None:
        """Take in the result of the oldest plan in flight.

        Raises:
            ExecutorError: it is another step's result, or of another size; or cache blocks are still held after the last request.
        """
        planned = self._take_planned(result)
        batch = DeltaBatch()
        self._batches.append(batch)
        self._apply_prompt_logprobs(planned, result)
        self._apply_tokens(planned, result, batch)
        self._end_overdue(now)
        if not self.has_work:
            self._cache.check_idle()

    def wait_for_masks(self, seconds: float) -> None:
        """Wait for the next mask of a sequence that nothing else holds up, but not for longer. For when nothing could be planned."""
        for sequence in self._running.masked():
            if sequence.mask is not None and not sequence.mask.is_ready:
                sequence.mask.wait(seconds)
                return

    def take_deltas(self) -> list[TokenDelta]:
        """What happened since the last call, one for each request and step, in order of steps."""
        return [delta for batch in self.take_batches() for delta in batch.objects()]

    def take_batches(self) -> list[DeltaBatch]:
        """The same as `take_deltas` in columns, one batch or more a step."""
        batches, self._batches = self._batches, []
        return batches

    def num_microbatches(self, num_seqs: int) -> int:
        """Into how many micro-batches ``num_seqs`` decoding sequences are divided."""
        return self._running.num_microbatches(num_seqs)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended or any step is in flight."""
        return bool(self._sequences or self._in_flight)

    @property
    def has_news(self) -> bool:
        """Whether `take_batches` has something to give: a request may end without a step, when it is submitted or cancelled."""
        return bool(self._batches)

    def stats(self) -> SchedulerStats:
        """Counts of now."""
        return SchedulerStats(
            num_running=self._table.num_running,
            num_waiting=len(self._waiting),
            kv_blocks_used=self._cache.num_blocks - self._cache.num_free_blocks,
            kv_blocks_total=self._cache.num_blocks,
            num_preemptions=self._running.num_preemptions,
            prefix_query_tokens=self._running.prefix_query_tokens,
            prefix_hit_tokens=self._running.prefix_hit_tokens,
        )

    def _join_group(self, sequence: Sequence) -> None:
        """Let a sequence share the prompt of the request that it names, unless that one has ended."""
        request = sequence.request
        first = None if request.fork_from is None else self._sequences.get(request.fork_from)
        if first is None:
            return
        ours, theirs = ((one.request.prompt_token_ids, one.salt, one.request.priority) for one in (sequence, first))
        if ours != theirs:
            raise RequestError(
                f"fork_from={request.fork_from!r} has another prompt, cache salt or priority; name a request with the same",
                "fork_from",
            )
        first.group = sequence.group = first.group or PromptGroup(first)

    def _take_cache_changes(self) -> CacheChanges:
        return CacheChanges(self._cache.take_new_blocks(), self._cache.take_copies())

    def _take_planned(self, result: StepResult) -> PlannedStep:
        planned = self._in_flight.popleft() if self._in_flight else None
        if planned is None or planned.step_id != result.step_id or planned.num_rows != len(result.token_ids):
            expected = "no step is in flight"
            if planned is not None:
                expected = f"step {planned.step_id} with {planned.num_rows} rows is next"
            raise ExecutorError(
                f"got step {result.step_id} with {len(result.token_ids)} rows, but {expected}; "
                "results must come in the order of plans"
            )
        return planned

    def _apply_tokens(self, planned: PlannedStep, result: StepResult, batch: DeltaBatch) -> None:
        table = self._table
        # Rows whose sequence ended or was preempted while the step was in flight are passed over.
        rows = np.flatnonzero(table.epochs[planned.seq_indices] == planned.epochs)
        if self._running.beams:
            rows = self._apply_beams(planned.seq_indices, rows, result)
        seq_indices, token_ids = planned.seq_indices[rows], result.token_ids[rows]
        lengths = table.append(seq_indices, token_ids)
        if table.masks:
            self._advance_masks(seq_indices, token_ids)
        codes = outcomes(table, seq_indices, token_ids, lengths)
        first_news = table.has_first_news[seq_indices] & (lengths == table.num_prompt[seq_indices] + 1)
        special = (codes != GOES_ON) | table.wants_logprobs[seq_indices] | first_news
        plain = np.flatnonzero(~special)
        plain_indices = seq_indices[plain]
        batch.request_ids = table.request_ids[plain_indices]
        batch.numbers = table.numbers[plain_indices]
        batch.token_ids = token_ids[plain]
        for i in np.flatnonzero(special).tolist():
            sequence = table.sequences[seq_indices[i]]
            assert sequence is not None
            self._apply_special(sequence, result, int(rows[i]), int(codes[i]), bool(first_news[i]))

    def _advance_masks(self, seq_indices: SeqIndexArray, token_ids: Int32Array) -> None:
        masks = self._table.masks
        for seq_index, token_id in zip(seq_indices.tolist(), token_ids.tolist(), strict=True):
            if seq_index in masks and token_id >= 0:
                masks[seq_index].accept(token_id)

    def _apply_beams(self, seq_indices: SeqIndexArray, rows: SeqIndexArray, result: StepResult) -> SeqIndexArray:
        """Take candidates of beams, and advance searches that have all of theirs; returns the rows that are not beams'."""
        table = self._table
        are_beams = table.is_beam[seq_indices[rows]]
        table.settle(seq_indices[rows[are_beams]])
        groups: dict[BeamGroup, None] = {}
        for row in rows[are_beams].tolist():
            sequence = table.sequences[seq_indices[row]]
            beam = None if sequence is None else self._running.beams.get(sequence)
            if sequence is None or beam is None:  # its search has just failed
                continue
            if result.token_ids[row] < 0:
                self._fail(sequence)
                continue
            count = num_alternatives(sequence, self._config.vocab_size)
            pairs = zip(result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist(), strict=True)
            beam.next_tokens = list(pairs)
            groups[beam.group] = None
        for group in groups:
            if not group.leader.has_ended and group.is_complete:
                self._running.advance_beams(group)
                if group.search.is_done:
                    self._finish(group)
        return rows[~are_beams]

    def _finish(self, group: BeamGroup) -> None:
        """Give the answers of a search, best first, to its request and to those that follow it, once all of these have come."""
        if len(group.followers) < group.leader.request.num_followers:
            return
        requests = [group.leader, *group.followers]
        answers = tuple(group.hypotheses)
        for sequence, answer in zip(requests, answers, strict=False):
            if not sequence.has_ended:
                self._forget(sequence)
                self._emit_answer(sequence, answer, group)
        for sequence in requests[len(answers) :]:
            if not sequence.has_ended:
                self._end(
                    sequence,
                    "error",
                    f"the beam search has {len(answers)} answers, as the vocabulary allows no more; ask for fewer, or for longer ones",
                )

    def _emit_answer(self, sequence: Sequence, answer: Hypothesis, group: BeamGroup) -> None:
        params, last = sequence.request.params, answer.tokens[-1].token_id
        self._emit(
            TokenDelta(
                sequence.request.request_id,
                answer.token_ids,
                logprobs=() if params.logprobs is None else answer.tokens,
                prompt_logprobs=_all_prompt_logprobs(group.leader),
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop
                or (last if answer.finish_reason == "stop" and last in params.stop_token_ids else None),
                num_cached_tokens=max(sequence.num_cached_tokens, 0),
                hypotheses=tuple(group.hypotheses) if sequence is group.leader else (),
            )
        )

    def _follow(self, sequence: Sequence, leader_id: str) -> int:
        """Register a request that gets the next best answer of a search.

        Raises:
            RequestError: there is no such search, it is of another prompt, or all its answers are taken.
        """
        group = self._searches.get(leader_id)
        same = (sequence.request.prompt_token_ids, sequence.request.params)
        if group is None or (group.leader.request.prompt_token_ids, group.leader.request.params) != same:
            raise RequestError(
                f"fork_from={leader_id!r} is not a beam search for the same prompt with the same parameters; submit it first",
                "fork_from",
            )
        if len(group.followers) + 1 >= group.search.width:
            raise RequestError(
                f"fork_from={leader_id!r} has beam_width={group.search.width} answers, all taken", "fork_from"
            )
        group.followers.append(sequence)
        self._num_submitted += 1
        self._sequences[sequence.request.request_id] = sequence
        if sequence.request.deadline is not None:
            self._deadlines.add(sequence.request.deadline, sequence)
        if group.search.is_done:
            self._finish(group)
        return sequence.number

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

    def _end_without_mask(self) -> None:
        """End sequences that have no next mask, each with the reason: its guide."""
        for sequence in self._running.masked():
            if sequence.mask is not None and sequence.mask.problem is not None:
                guide = sequence.request.params.structured_outputs
                self._end(sequence, "error", sequence.mask.problem, None if guide is None else guide.name)

    def _end_overdue(self, now: float) -> None:
        for sequence in self._deadlines.take_overdue(now):
            self._end(sequence, "error", "the deadline passed; allow more time (--request-timeout) or ask for less")

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose numbers are broken, and never share what it left in the cache."""
        position = int(self._table.num_known[sequence.seq_index])
        if sequence.is_beam:
            group = self._running.beams[sequence].group
            sequence = group.leader
            self._running.discard_beams(group)
        else:
            self._running.discard(sequence)
        self._end(
            sequence,
            "error",
            f"the model's output was not finite near position {position}; the checkpoint or its dtype cannot "
            "represent this input (try --dtype bfloat16, whose range is wider than that of float16, or float32)",
        )

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, error_param: str | None = None
    ) -> None:
        """End a request without another token."""
        scored = reason == "length"  # asked for no tokens, and has what it asked for
        group = self._searches.get(sequence.request.request_id)
        ended = (
            [sequence, *(follower for follower in group.followers if not follower.has_ended)] if group else [sequence]
        )
        for one in ended:
            self._forget(one)
            self._emit(
                TokenDelta(
                    one.request.request_id,
                    prompt_logprobs=_all_prompt_logprobs(one) if scored else None,
                    finish_reason=reason,
                    num_cached_tokens=max(one.num_cached_tokens, 0) if scored else 0,
                    error=error,
                    error_param=error_param,
                )
            )

    def _forget(self, sequence: Sequence) -> None:
        group = self._searches.pop(sequence.request.request_id, None)
        if group is not None:
            self._running.end_beams(group)
        self._running.end(sequence)
        sequence.has_ended = True
        del self._sequences[sequence.request.request_id]

    def _emit(self, delta: TokenDelta) -> None:
        if not self._batches:
            self._batches.append(DeltaBatch())
        self._batches[-1].deltas.append(delta)


def _all_prompt_logprobs(sequence: Sequence) -> tuple[Logprob | None, ...] | None:
    return None if sequence.prompt_logprobs is None else tuple(sequence.prompt_logprobs)
