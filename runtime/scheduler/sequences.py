"""State of the requests: one record each, and for the running ones a struct of arrays with a row per slot."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.request import Logprob, Request

__all__ = ["Sequence", "SequenceTable", "SlotArray"]

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
SlotArray = NDArray[np.intp]
"""Slots that index a `SequenceTable`: NumPy would convert any other integer type at every use."""

_NO_TOKEN = -2
"""Fills `SequenceTable.end_ids`; not -1, which a sampled token is when the logits were not finite."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request from submit to its end.

    Attributes:
        number: order of arrival.
        token_ids: prompt, and after a preemption what was generated until then.
        seed: of its sampling noise.
        end_token_ids: tokens that end it.
        keys: prefix keys of the full blocks of known tokens.
        slot: row of `SequenceTable`; -1 while it waits.
        num_cached_tokens: prompt tokens that its first admission found in the cache.
        prompt_logprobs: those known so far; None unless asked for.
        has_ended: its last delta was given.
    """

    number: int
    request: Request
    token_ids: Int32Array
    seed: int
    end_token_ids: tuple[int, ...]
    keys: list[bytes] = field(default_factory=list)
    slot: int = -1
    num_cached_tokens: int = -1
    prompt_logprobs: list[Logprob | None] | None = None
    has_ended: bool = False

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
    """Running sequences, a row per slot. Free rows have nothing left to compute, so that masks need not leave
    them out.

    Attributes:
        token_ids: ``[slots, max_model_len]`` known tokens. Pages that no sequence reached are never touched.
        num_known: tokens in ``token_ids``.
        num_computed: positions that plans cover, those in flight included.
        num_pending: sampled tokens in flight.
        num_prompt, target_length: see `Sequence`.
        min_length: no end token counts up to this length.
        end_ids: ``[W, slots]`` tokens that end the sequence.
        epochs: changes when a row gets another owner, so that a result in flight is not taken for the new
            one's.
        numbers: order of arrival; -1 = free row.
        last_turns: when a plan took the row last, counted in rows planned.
        wants_logprobs: the request reports log-probabilities of its tokens.
        has_first_news: its first token comes with more: prompt log-probabilities or the number of cached
            tokens.
        request_ids: ``[slots]`` of str.
        sequences: the records.
    """

    def __init__(self, num_slots: int, max_model_len: int, lookahead: int) -> None:
        self._lookahead = lookahead
        self.token_ids = np.zeros((num_slots, max_model_len), np.int32)
        self._flat_token_ids = self.token_ids.reshape(-1)  # indexed three times as fast
        self.num_known = np.zeros(num_slots, np.int32)
        self.num_computed = np.zeros(num_slots, np.int32)
        self.num_pending = np.zeros(num_slots, np.int32)
        self.num_prompt = np.zeros(num_slots, np.int32)
        self.target_length = np.ones(num_slots, np.int32)
        self.min_length = np.zeros(num_slots, np.int32)
        self.end_ids = np.full((1, num_slots), _NO_TOKEN, np.int32)
        self.epochs = np.zeros(num_slots, np.int64)
        self.numbers = np.full(num_slots, -1, np.int64)
        self.last_turns = np.zeros(num_slots, np.int64)
        self.wants_logprobs = np.zeros(num_slots, np.bool_)
        self.has_first_news = np.zeros(num_slots, np.bool_)
        self.request_ids = np.full(num_slots, "", np.object_)
        self.sequences: list[Sequence | None] = [None] * num_slots
        self._free_slots = list(range(num_slots))
        self._num_turns = 0

    @property
    def num_free(self) -> int:
        """Slots without a sequence."""
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        """Slots with a sequence."""
        return len(self.sequences) - len(self._free_slots)

    @property
    def next_slot(self) -> int:
        """The slot that `add` takes: the lowest free one, so that rows in use stay dense."""
        return self._free_slots[0]

    def add(self, sequence: Sequence, num_computed: int) -> None:
        """Give `next_slot` to a sequence whose first ``num_computed`` tokens are in the cache."""
        slot = sequence.slot = heapq.heappop(self._free_slots)
        num_known = len(sequence.token_ids)
        self.token_ids[slot, :num_known] = sequence.token_ids
        self.num_known[slot] = num_known
        self.num_computed[slot] = num_computed
        self.num_prompt[slot] = sequence.num_prompt
        self.target_length[slot] = sequence.target_length
        self.min_length[slot] = sequence.num_prompt + sequence.request.params.min_tokens
        self._set_end_ids(slot, sequence.end_token_ids)
        self.numbers[slot] = sequence.number
        self.wants_logprobs[slot] = sequence.request.params.logprobs is not None
        self.has_first_news[slot] = sequence.prompt_logprobs is not None or sequence.num_cached_tokens > 0
        self.request_ids[slot] = sequence.request.request_id
        self.sequences[slot] = sequence

    def remove(self, slot: int) -> None:
        """Free a row; results of its steps in flight will be passed over."""
        sequence = self.sequences[slot]
        assert sequence is not None, slot
        sequence.slot = -1
        self.sequences[slot] = None
        self.num_known[slot] = self.num_computed[slot] = self.num_pending[slot] = 0
        self.target_length[slot] = 1
        self.epochs[slot] += 1
        self.numbers[slot] = -1
        heapq.heappush(self._free_slots, slot)

    def known_tokens(self, slot: int) -> Int32Array:
        """Prompt and generated tokens of a row; a view."""
        return self.token_ids[slot, : self.num_known[slot]]

    def num_filled(self, slot: int) -> int:
        """Leading tokens known and covered by plans: what the cache is sure to hold for later plans."""
        return int(min(self.num_known[slot], self.num_computed[slot]))

    def remaining(self) -> Int32Array:
        """``[slots]`` tokens that could be computed now.

        The last token of all is never computed: nothing follows it. Pending tokens count as far as the
            lookahead goes.
        """
        ahead = np.minimum(self.num_pending, self._lookahead)
        reach = np.minimum(self.num_known + ahead, self.target_length - 1)
        return reach - self.num_computed

    def num_decoding(self) -> int:
        """Running sequences whose prompt is computed or planned, but for its last token."""
        unplanned = np.minimum(self.num_known + self.num_pending, self.target_length - 1) - self.num_computed
        return int(np.count_nonzero(unplanned <= 1)) - self.num_free

    def youngest(self) -> int:
        """Slot of the running sequence that arrived last."""
        return int(np.argmax(self.numbers))

    def tokens_at(self, slots: SlotArray, positions: Int32Array) -> Int32Array:
        """``[S]`` one token of each row; meaningless where it is not known."""
        return self._flat_token_ids.take(slots * self.token_ids.shape[1] + positions)

    def mark_planned(self, slots: SlotArray, counts: Int32Array, sampling_slots: SlotArray) -> None:
        """Count a plan's positions and samples as in flight."""
        self.num_computed[slots] += counts
        self.num_pending[sampling_slots] += 1
        self.last_turns[slots] = np.arange(self._num_turns, self._num_turns + len(slots))
        self._num_turns += len(slots)

    def append(self, slots: SlotArray, token_ids: Int32Array) -> Int32Array:
        """Add a sampled token to each row; returns the new lengths ``[S]``."""
        lengths = self.num_known[slots]
        self._flat_token_ids[slots * self.token_ids.shape[1] + lengths] = token_ids
        lengths += 1
        self.num_known[slots] = lengths
        self.num_pending[slots] -= 1
        return lengths

    def _set_end_ids(self, slot: int, end_token_ids: tuple[int, ...]) -> None:
        missing = len(end_token_ids) - len(self.end_ids)
        if missing > 0:
            self.end_ids = np.pad(self.end_ids, ((0, missing), (0, 0)), constant_values=_NO_TOKEN)
        self.end_ids[:, slot] = _NO_TOKEN
        self.end_ids[: len(end_token_ids), slot] = end_token_ids
