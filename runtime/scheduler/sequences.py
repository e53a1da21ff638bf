# SPDX-License-Identifier: Apache-2.0
"""State of the requests: one record each, and for the running ones a struct of arrays with a row each."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.request import Logprob, Request
from phalanx.runtime.sampling.biases import TokenBias
from phalanx.runtime.sampling.masks import TokenMask

__all__ = ["PromptGroup", "SeqIndexArray", "Sequence", "SequenceTable"]

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
SeqIndexArray = NDArray[np.intp]
"""Rows of a `SequenceTable`: NumPy would convert any other integer type at every use."""

_NO_TOKEN = -2
"""Fills `SequenceTable.end_ids`; not -1, which a sampled token is when the logits were not finite."""


@dataclass(slots=True, eq=False)
class PromptGroup:
    """Sequences with one prompt, which is computed once for all that start while another of them runs.

    Attributes:
        leader: the one whose prompt the others take over; after its end, the next that starts.
    """

    leader: Sequence


@dataclass(slots=True, eq=False)
class Sequence:
    """One request from submit to its end.

    Attributes:
        number: order of arrival.
        token_ids: prompt, and after a preemption what was generated until then.
        seed: of its sampling noise.
        end_token_ids: tokens that end it.
        biases: its token biases.
        mask: which tokens it may choose next; None = any.
        keys: prefix keys of the full blocks of known tokens.
        seq_index: row of `SequenceTable`; -1 while it waits.
        num_cached_tokens: prompt tokens that its first admission found in the cache.
        prompt_logprobs: those known so far; None unless asked for.
        has_ended: its last delta was given.
        group: sequences with its prompt, if requests named each other.
        is_beam: it computes a beam of a search (`phalanx.runtime.scheduler.beams`).
        num_prefix: leading tokens that see one another, which one step computes (`AttentionSpec.prefix_end`).
    """

    number: int
    request: Request
    token_ids: Int32Array
    seed: int
    end_token_ids: tuple[int, ...]
    biases: list[TokenBias] = field(default_factory=list)
    mask: TokenMask | None = None
    keys: list[bytes] = field(default_factory=list)
    seq_index: int = -1
    num_cached_tokens: int = -1
    prompt_logprobs: list[Logprob | None] | None = None
    has_ended: bool = False
    group: PromptGroup | None = None
    is_beam: bool = False
    num_prefix: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Sequences start in this order; the last one that runs is preempted first."""
        return self.request.priority, self.number

    @property
    def salt(self) -> bytes:
        """Sequences of another salt share no prefix with it. Tokens that see later ones belong to it."""
        salt = self.request.cache_salt.encode()
        if not self.num_prefix:
            return salt
        return self.num_prefix.to_bytes(4, "little") + self.token_ids[: self.num_prefix].tobytes() + salt

    @property
    def leader(self) -> Sequence | None:
        """The sequence whose prompt it takes over when it starts; None if it starts by itself, or has started."""
        if self.group is None or self.num_cached_tokens >= 0 or self.lacks_prompt_logprobs:
            return None
        leader = self.group.leader
        return None if leader is self or leader.has_ended else leader

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def target_length(self) -> int:
        """Tokens of prompt and output at which it ends by length."""
        return self.num_prompt + self.request.params.max_tokens

    @property
    def num_to_compute(self) -> int:
        """Known tokens that have to pass through the model; the very last one never does."""
        return min(len(self.token_ids), self.target_length - 1)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities were asked for and some are missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt


class SequenceTable:
    """Running sequences, a row each. Free rows have nothing left to compute, so that masks need not leave
    them out.

    Attributes:
        token_ids: ``[max_num_seqs, max_model_len]`` known tokens. Pages that no sequence reached are never touched.
        num_known: tokens in ``token_ids``.
        num_computed: positions that plans cover, those in flight included.
        num_pending: sampled tokens in flight.
        num_prompt, target_length: see `Sequence`.
        min_length: no end token counts up to this length.
        end_ids: ``[W, max_num_seqs]`` tokens that end the sequence.
        stop_sequences: for rows that have any, lists of tokens that end the sequence together.
        masks: of rows that have one.
        lookahead: ``[max_num_seqs]`` 1 where a row may be planned again before its last token is known.
        epochs: changes when a row gets another owner, so that a result in flight is not taken for the new
            one's.
        numbers: order of arrival; -1 = free row.
        priorities: see `Request.priority`.
        last_turns: when a plan took the row last, counted in rows planned.
        wants_logprobs: the request reports log-probabilities of its tokens.
        has_first_news: its first token comes with more: prompt log-probabilities or the number of cached
            tokens.
        request_ids: ``[max_num_seqs]`` of str.
        is_beam: the row belongs to a beam search.
        sequences: the records.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, lookahead: int) -> None:
        self._most_lookahead = lookahead
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._flat_token_ids = self.token_ids.reshape(-1)  # indexed three times as fast
        self.num_known = np.zeros(max_num_seqs, np.int32)
        self.num_computed = np.zeros(max_num_seqs, np.int32)
        self.num_pending = np.zeros(max_num_seqs, np.int32)
        self.num_prompt = np.zeros(max_num_seqs, np.int32)
        self.target_length = np.ones(max_num_seqs, np.int32)
        self.min_length = np.zeros(max_num_seqs, np.int32)
        self.end_ids = np.full((1, max_num_seqs), _NO_TOKEN, np.int32)
        self.stop_sequences: dict[int, list[list[int]]] = {}
        self.masks: dict[int, TokenMask] = {}
        self.lookahead = np.full(max_num_seqs, lookahead, np.int32)
        self.epochs = np.zeros(max_num_seqs, np.int64)
        self.numbers = np.full(max_num_seqs, -1, np.int64)
        self.priorities = np.zeros(max_num_seqs, np.int64)
        self.last_turns = np.zeros(max_num_seqs, np.int64)
        self.wants_logprobs = np.zeros(max_num_seqs, np.bool_)
        self.has_first_news = np.zeros(max_num_seqs, np.bool_)
        self.is_beam = np.zeros(max_num_seqs, np.bool_)
        self.request_ids = np.full(max_num_seqs, "", np.object_)
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self._free_indices = list(range(max_num_seqs))
        self._num_turns = 0

    @property
    def num_free(self) -> int:
        """Rows without a sequence."""
        return len(self._free_indices)

    @property
    def num_running(self) -> int:
        """Rows with a sequence."""
        return len(self.sequences) - len(self._free_indices)

    @property
    def next_seq_index(self) -> int:
        """The row that `add` takes: the lowest free one, so that rows in use stay dense."""
        return self._free_indices[0]

    def add(self, sequence: Sequence, num_computed: int) -> None:
        """Give `next_seq_index` to a sequence whose first ``num_computed`` tokens are in the cache."""
        seq_index = sequence.seq_index = heapq.heappop(self._free_indices)
        num_known = len(sequence.token_ids)
        self.token_ids[seq_index, :num_known] = sequence.token_ids
        self.num_known[seq_index] = num_known
        self.num_computed[seq_index] = num_computed
        self.num_prompt[seq_index] = sequence.num_prompt
        self.target_length[seq_index] = sequence.target_length
        self.min_length[seq_index] = sequence.num_prompt + sequence.request.params.min_tokens
        self._set_end_ids(seq_index, sequence.end_token_ids)
        if sequences := sequence.request.params.stop_token_sequences:
            self.stop_sequences[seq_index] = [list(tokens) for tokens in sequences]
        self._set_mask(seq_index, sequence.mask)
        self.numbers[seq_index] = sequence.number
        self.priorities[seq_index] = sequence.request.priority
        self.wants_logprobs[seq_index] = sequence.request.params.logprobs is not None
        self.has_first_news[seq_index] = sequence.prompt_logprobs is not None or sequence.num_cached_tokens > 0
        self.request_ids[seq_index] = sequence.request.request_id
        self.is_beam[seq_index] = sequence.is_beam
        if sequence.is_beam:
            self.lookahead[seq_index] = 0
        self.sequences[seq_index] = sequence

    def remove(self, seq_index: int) -> None:
        """Free a row; results of its steps in flight will be passed over."""
        sequence = self.sequences[seq_index]
        assert sequence is not None, seq_index
        sequence.seq_index = -1
        self.sequences[seq_index] = None
        self.num_known[seq_index] = self.num_computed[seq_index] = self.num_pending[seq_index] = 0
        self.target_length[seq_index] = 1
        self.stop_sequences.pop(seq_index, None)
        self._set_mask(seq_index, None)
        self.epochs[seq_index] += 1
        self.numbers[seq_index] = -1
        heapq.heappush(self._free_indices, seq_index)

    def known_tokens(self, seq_index: int) -> Int32Array:
        """Prompt and generated tokens of a row; a view."""
        return self.token_ids[seq_index, : self.num_known[seq_index]]

    def num_filled(self, seq_index: int) -> int:
        """Leading tokens known and covered by plans: what the cache is sure to hold for later plans."""
        return int(min(self.num_known[seq_index], self.num_computed[seq_index]))

    def remaining(self) -> Int32Array:
        """``[max_num_seqs]`` tokens that could be computed now.

        The last token of all is never computed: nothing follows it. Pending tokens count as far as the
            lookahead goes.
        """
        ahead = np.minimum(self.num_pending, self.lookahead)
        reach = np.minimum(self.num_known + ahead, self.target_length - 1)
        return reach - self.num_computed

    def num_decoding(self) -> int:
        """Running sequences whose prompt is computed or planned, but for its last token."""
        unplanned = np.minimum(self.num_known + self.num_pending, self.target_length - 1) - self.num_computed
        return int(np.count_nonzero(unplanned <= 1)) - self.num_free

    def in_order(self, seq_indices: SeqIndexArray) -> SeqIndexArray:
        """The same rows by the `Sequence.order` of what runs there."""
        return seq_indices[np.lexsort((self.numbers[seq_indices], self.priorities[seq_indices]))]

    def last(self) -> int:
        """Row of the running sequence that comes last in order."""
        return int(self.in_order(np.flatnonzero(self.numbers >= 0))[-1])

    def tokens_at(self, seq_indices: SeqIndexArray, positions: Int32Array) -> Int32Array:
        """``[S]`` one token of each row; meaningless where it is not known."""
        return self._flat_token_ids.take(seq_indices * self.token_ids.shape[1] + positions)

    def mark_planned(
        self, seq_indices: SeqIndexArray, num_scheduled_tokens: Int32Array, sampling_indices: SeqIndexArray
    ) -> None:
        """Count a plan's positions and samples as in flight."""
        self.num_computed[seq_indices] += num_scheduled_tokens
        self.num_pending[sampling_indices] += 1
        self.last_turns[seq_indices] = np.arange(self._num_turns, self._num_turns + len(seq_indices))
        self._num_turns += len(seq_indices)

    def append(self, seq_indices: SeqIndexArray, token_ids: Int32Array) -> Int32Array:
        """Add a sampled token to each row; returns the new lengths ``[S]``."""
        lengths = self.num_known[seq_indices]
        self._flat_token_ids[seq_indices * self.token_ids.shape[1] + lengths] = token_ids
        lengths += 1
        self.num_known[seq_indices] = lengths
        self.num_pending[seq_indices] -= 1
        return lengths

    def _set_mask(self, seq_index: int, mask: TokenMask | None) -> None:
        self.masks.pop(seq_index, None)
        self.lookahead[seq_index] = self._most_lookahead
        if mask is not None:
            self.masks[seq_index] = mask
            if mask.follows_tokens:
                self.lookahead[seq_index] = 0

    def ends_in_stop_sequence(self, seq_index: int) -> bool:
        """Whether the output of a row ends in one of its stop sequences."""
        output = self.known_tokens(seq_index)[self.num_prompt[seq_index] :]
        return any(output[-len(tokens) :].tolist() == tokens for tokens in self.stop_sequences[seq_index])

    def settle(self, seq_indices: SeqIndexArray) -> None:
        """Count a sample of each row as arrived without adding a token."""
        self.num_pending[seq_indices] -= 1

    def append_one(self, seq_index: int, token_id: int) -> None:
        """Add a token that was not sampled in this row's step but chosen afterwards."""
        self.token_ids[seq_index, self.num_known[seq_index]] = token_id
        self.num_known[seq_index] += 1

    def _set_end_ids(self, seq_index: int, end_token_ids: tuple[int, ...]) -> None:
        missing = len(end_token_ids) - len(self.end_ids)
        if missing > 0:
            self.end_ids = np.pad(self.end_ids, ((0, missing), (0, 0)), constant_values=_NO_TOKEN)
        self.end_ids[:, seq_index] = _NO_TOKEN
        self.end_ids[: len(end_token_ids), seq_index] = end_token_ids
