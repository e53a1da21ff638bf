# SPDX-License-Identifier: Apache-2.0
"""Which sequences run and which of them a step computes: admission, preemption, chunks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phalanx.runtime.kv_cache import CachePlanner
from phalanx.runtime.sampling.fields import MAX_PLAN_BIASES
from phalanx.runtime.sampling.mask_sizes import most_masked_seqs
from phalanx.runtime.scheduler.admission import admission_row, bias_rows
from phalanx.runtime.scheduler.beams import Beam, BeamGroup
from phalanx.runtime.scheduler.microbatches import num_microbatches
from phalanx.runtime.scheduler.sequences import PromptGroup, SeqIndexArray, Sequence, SequenceTable
from phalanx.runtime.scheduler.values import SchedulerConfig
from phalanx.runtime.scheduler.waiting import WaitingQueue

__all__ = ["RunningSet", "Selection"]


@dataclass(slots=True)
class Selection:
    """What a step computes.

    Attributes:
        decodes: ``[S]`` sequences that compute one token.
        chunks: (seq_index, tokens) of prompts, and of what is computed again after a preemption.
        admissions: rows of `ADMISSION` for sequences that start.
        biases: rows of `TOKEN_BIAS_ENTRY` for them.
    """

    decodes: SeqIndexArray
    chunks: list[tuple[int, int]] = field(default_factory=list)
    admissions: list[tuple[Any, ...]] = field(default_factory=list)
    biases: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decodes) + sum(count for _, count in self.chunks)


class RunningSet:
    """Admits waiting sequences, shares out cache blocks among the running ones, and selects what a step computes.

    The first request in order (`Sequence.order`: by priority, then first come, first served) is admitted first and preempted last, so
    that every request ends unless others of higher priority never cease to come.

    Args:
        table: the running sequences.
        waiting: the others.

    Attributes:
        beams: those of all searches, by their sequences.
        num_preemptions, prefix_query_tokens, prefix_hit_tokens: see `SchedulerStats`.
    """

    def __init__(
        self, config: SchedulerConfig, cache: CachePlanner, table: SequenceTable, waiting: WaitingQueue
    ) -> None:
        self._config, self._cache, self._table, self._waiting = config, cache, table, waiting
        self._microbatches = _microbatches_by_seqs(config)
        self._most_masked = most_masked_seqs(config.vocab_size)
        self._heirs: list[Sequence] = []
        self.beams: dict[Sequence, Beam] = {}
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def num_microbatches(self, num_seqs: int) -> int:
        """Into how many micro-batches that many decoding sequences are divided."""
        return self._microbatches[num_seqs]

    def select(self, num_in_flight: int) -> Selection:
        """Decodes first, then the prompt under way, then new requests, up to the token budget.

        Nothing while the steps in flight are enough.
        """
        if self._config.step_times is not None and self._is_full(num_in_flight):
            return Selection(np.empty(0, np.intp))
        if self.beams:
            self._place_beams()
        selection = Selection(self._choose_decodes())
        for heir in self._heirs:
            if heir.seq_index >= 0:
                self._add_admission(selection, heir)
        self._add_chunks(selection)
        self._admit(selection)
        if selection.num_tokens:
            self._heirs.clear()
        return selection

    def mark_filled(self, chunks: list[tuple[int, int]]) -> None:
        """Offer the full blocks of planned chunks for sharing.

        To be called when the plan is made, not before: a plan may share what earlier plans compute, never its own.
        """
        for seq_index, _ in chunks:
            sequence = self._table.sequences[seq_index]
            assert sequence is not None
            self._cache.mark_filled(
                seq_index, sequence.keys[: self._table.num_filled(seq_index) // self._cache.block_size]
            )

    def end(self, sequence: Sequence) -> None:
        """Release a sequence for good; its prompt goes to one that waits for it, whose first step is then in the next plan."""
        group = sequence.group
        if group is not None and group.leader is sequence and sequence.seq_index >= 0 and self._table.num_free:
            self._hand_over(group)
        self.release(sequence)

    def end_beams(self, group: BeamGroup) -> None:
        """Release all beams of a search."""
        for beam in group.beams:
            del self.beams[beam.sequence]
            self.release(beam.sequence)
        group.beams = []

    def discard_beams(self, group: BeamGroup) -> None:
        """Release all beams of a search whose numbers are broken; what they left is never shared."""
        for beam in group.beams:
            if beam.is_running:
                self.discard(beam.sequence)

    def advance_beams(self, group: BeamGroup) -> None:
        """Go on with the next beams of a search whose beams have all been computed."""
        group.advance(self._table, self.release)

    def _hand_over(self, group: PromptGroup) -> None:
        """Start a sequence that waits for the prompt of the group's leader, which is about to end, if it is its turn anyway."""
        heir = next(iter(self._waiting), None)
        if heir is None or heir.group is not group or heir.leader is None or self._waits_for_prompt(heir):
            return
        if sum(len(other.biases) for other in (*self._heirs, heir)) > MAX_PLAN_BIASES or not self._may_run_masked(heir):
            return
        if self._num_heir_blocks >= self._config.max_num_batched_tokens:
            return
        num_cached = self._reserve(heir)
        if num_cached is not None:
            self._waiting.discard(heir)
            self._table.add(heir, num_cached)
            self._heirs.append(heir)
            group.leader = heir

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's row and blocks, or the place in the queue; known tokens stay in the cache for later prompts."""
        seq_index = sequence.seq_index
        if seq_index < 0:
            self._waiting.discard(sequence)
            return
        filled = self._table.known_tokens(seq_index)[: self._table.num_filled(seq_index)]
        self._cache.extend_keys(sequence.keys, filled, sequence.salt)
        self._cache.release(seq_index, sequence.keys[: len(filled) // self._cache.block_size])
        self._table.remove(seq_index)

    def discard(self, sequence: Sequence) -> None:
        """Free row and blocks of a running sequence whose numbers are broken; what it left is never shared."""
        self._cache.discard(sequence.seq_index)
        self._table.remove(sequence.seq_index)

    @property
    def _num_heir_blocks(self) -> int:
        """Blocks of sequences that have started since the last plan: the next one must tell of them."""
        return sum(self._num_blocks(heir) for heir in self._heirs if heir.seq_index >= 0)

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self._cache.block_size)

    def _place_beams(self) -> None:
        """Give rows to beams that fork from running ones, the first search in order first, taking them from later requests if need be.

        What the plan has no room for starts with the next one.
        """
        waiting = [beam for beam in self.beams.values() if beam.parent is not None and not beam.is_running]
        for beam in sorted(waiting, key=lambda beam: beam.sequence.order):
            if self._num_heir_blocks >= self._config.max_num_batched_tokens:
                break
            while beam.parent is not None and self._may_fork(beam, beam.parent):
                if self._fork(beam, beam.parent):
                    break
                last = self._table.last()
                if (other := self._table.sequences[last]) is None or other.order <= beam.sequence.order:
                    break
                self._preempt(last)

    def _may_fork(self, beam: Beam, parent: Beam) -> bool:
        seq_index = parent.sequence.seq_index
        return seq_index >= 0 and int(self._table.num_computed[seq_index]) >= beam.num_shared

    def _fork(self, beam: Beam, parent: Beam) -> bool:
        """Start a beam with its parent's cache; False if there is no row, or too few blocks."""
        sequence = beam.sequence
        if not self._table.num_free:
            return False
        num_tokens, expected = len(sequence.token_ids), sequence.target_length - 1
        num_cached = self._cache.fork(
            self._table.next_seq_index, parent.sequence.seq_index, beam.num_shared, num_tokens, expected, spare_blocks=0
        )
        if num_cached is None:
            return False
        self._table.add(sequence, num_cached)
        self._heirs.append(sequence)
        beam.parent = None
        return True

    def _is_full(self, num_in_flight: int) -> bool:
        """Whether more steps would cut the micro-batches smaller than is best; chunks of a long prompt cut nothing.

        Sequences whose results return meanwhile gather, so that micro-batches which were smaller come together.
        """
        enough = self.num_microbatches(self._table.num_decoding()) + self._config.lookahead
        return num_in_flight >= enough and not (self._table.remaining() > 1).any()

    def _choose_decodes(self) -> SeqIndexArray:
        """Sequences that compute one token, with blocks for it; preempts the last in order while blocks are short."""
        while True:
            candidates = np.flatnonzero(self._table.remaining() == 1)
            decodes = self._least_recent(self._with_masks(candidates) if self._table.masks else candidates)
            if self._cache.extend(decodes, self._table.num_computed[decodes]):
                return decodes
            self._preempt(self._table.last())

    def _with_masks(self, seq_indices: SeqIndexArray) -> SeqIndexArray:
        """Those whose next mask, if they have one, is there; the others do not hold them up."""
        late = [seq_index for seq_index, mask in self._table.masks.items() if not mask.is_ready]
        return seq_indices[~np.isin(seq_indices, late)] if late else seq_indices

    def _least_recent(self, seq_indices: SeqIndexArray) -> SeqIndexArray:
        """At most the token budget and a micro-batch's share, those first whose last turn is longest ago."""
        most = self._config.max_num_batched_tokens
        if self._config.num_microbatches > 1:
            most = min(most, self._share(self._table.num_decoding()))
        if len(seq_indices) <= most:
            return seq_indices
        return seq_indices[np.argsort(self._table.last_turns[seq_indices])[:most]]

    def _share(self, num_seqs: int) -> int:
        """Sequences of one micro-batch, so that there is work for all of them."""
        return -(-num_seqs // self.num_microbatches(num_seqs))

    def _add_chunks(self, selection: Selection) -> None:
        """More of what is partly computed, in order.

        There is one such prompt at most, as the next gets what it leaves over, and beams that start without their parent's cache.
        """
        remaining = self._table.remaining()
        budget = self._config.max_num_batched_tokens - selection.num_tokens
        unfinished = np.flatnonzero(remaining > 1)
        for seq_index in self._table.in_order(unfinished).tolist():
            count = min(int(remaining[seq_index]), budget)
            if count > 0:
                selection.chunks.append((seq_index, count))
                budget -= count

    def _admit(self, selection: Selection) -> None:
        """Start waiting requests in order while rows, blocks and token budget last.

        One whose prompt another is about to compute lets others pass until it can be forked. Starts also stop where their blocks
        would be more than a plan has room for, with one sequence over: prefixes in the cache cost blocks but no tokens.
        """
        most = self._share(self._table.num_running + min(len(self._waiting), self._table.num_free))
        budget = self._config.max_num_batched_tokens - selection.num_tokens
        num_blocks, started = self._num_heir_blocks, []
        for sequence in self._waiting:
            is_full = num_blocks >= self._config.max_num_batched_tokens or len(selection.chunks) >= most
            if (
                is_full
                or budget < max(sequence.num_prefix, 1)
                or self._table.num_free < self._num_reserved() + self._num_rows(sequence)
            ):
                break
            if len(selection.biases) + len(sequence.biases) > MAX_PLAN_BIASES:
                break
            if self._waits_for_prompt(sequence) or not self._may_run_masked(sequence):
                continue
            num_cached = self._reserve(sequence)
            if num_cached is None:
                break
            started.append(sequence)
            self._table.add(sequence, num_cached)
            count = min(sequence.num_to_compute - num_cached, budget)
            selection.chunks.append((sequence.seq_index, count))
            self._add_admission(selection, sequence)
            budget -= count
            num_blocks += self._num_blocks(sequence)
        for sequence in started:
            self._waiting.discard(sequence)

    def _num_rows(self, sequence: Sequence) -> int:
        """Rows that a request takes."""
        return sequence.request.params.beam_width if sequence.is_beam else 1

    def _num_reserved(self) -> int:
        """Rows that running searches have not taken yet."""
        groups = {beam.group for beam in self.beams.values() if beam.is_running} if self.beams else ()
        return sum(group.num_missing_rows for group in groups)

    def _add_admission(self, selection: Selection, sequence: Sequence) -> None:
        selection.admissions.append(admission_row(sequence, sequence.seq_index, self._config.vocab_size))
        selection.biases += bias_rows(sequence, sequence.seq_index)

    def masked(self) -> list[Sequence]:
        """Running and waiting sequences with masks."""
        running = [self._table.sequences[seq_index] for seq_index in self._table.masks]
        return [sequence for sequence in (*running, *self._waiting.masked.values()) if sequence is not None]

    def _may_run_masked(self, sequence: Sequence) -> bool:
        """Whether a plan has room for the sequence's mask, if it has one, and the mask is there."""
        if sequence.mask is None:
            return True
        return len(self._table.masks) < self._most_masked and sequence.mask.is_ready

    def _waits_for_prompt(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None:
            return False
        return leader.seq_index < 0 or int(self._table.num_computed[leader.seq_index]) < sequence.num_prompt - 1

    def _reserve(self, sequence: Sequence) -> int | None:
        """Blocks for all known tokens in the next free row; returns how many are cached, None if there are too few."""
        num_cached = self._take_blocks(sequence)
        if num_cached is not None:
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += num_cached
            if sequence.num_cached_tokens < 0:
                sequence.num_cached_tokens = num_cached
                if sequence.group is not None and sequence.group.leader.has_ended:
                    sequence.group.leader = sequence
        return num_cached

    def _take_blocks(self, sequence: Sequence) -> int | None:
        row, num_tokens, expected = self._table.next_seq_index, len(sequence.token_ids), sequence.target_length - 1
        # A block of growth for each running sequence stays free: docs/benchmarks/scheduler.md says what that saves.
        spare_blocks = self._table.num_running
        self._cache.extend_keys(sequence.keys, sequence.token_ids, sequence.salt)
        leader = sequence.leader
        if leader is not None:
            return self._cache.fork(row, leader.seq_index, num_tokens - 1, num_tokens, expected, spare_blocks)
        # Prompt log-probabilities need the logits of every prompt token, so these requests compute them all.
        keys = [] if sequence.lacks_prompt_logprobs else sequence.keys
        return self._cache.admit(row, num_tokens, expected, keys, spare_blocks)

    def _preempt(self, seq_index: int) -> None:
        """Take a sequence's row and blocks; all its tokens, generated ones too, will be computed again.

        It is not admitted again in the same plan (it would need the blocks that it just freed), so two sequences cannot evict
        each other forever.
        """
        sequence = self._table.sequences[seq_index]
        assert sequence is not None, "a sequence alone always fits: larger ones were refused"
        if sequence.is_beam:
            sequence = self._suspend(self.beams[sequence].group)
        else:
            sequence.token_ids = self._table.known_tokens(seq_index).copy()
            self.release(sequence)
        self._waiting.put_back(sequence)
        self.num_preemptions += 1

    def _suspend(self, group: BeamGroup) -> Sequence:
        """Take the rows of all beams of a search; returns the sequence that starts first when it goes on."""
        tokens = []
        for beam in group.beams:
            sequence = beam.sequence
            tokens.append(
                self._table.known_tokens(sequence.seq_index).copy() if beam.is_running else sequence.token_ids
            )
            if beam.is_running:
                self.release(sequence)
        return group.suspend(tokens)


def _microbatches_by_seqs(config: SchedulerConfig) -> list[int]:
    """A number for 0 to ``max_num_seqs`` decoding sequences."""
    if config.step_times is None:
        return [config.num_microbatches] * (config.max_num_seqs + 1)
    num_seqs = np.arange(config.max_num_seqs + 1)
    numbers: list[int] = num_microbatches(num_seqs, config.num_microbatches, config.step_times).tolist()
    return numbers
