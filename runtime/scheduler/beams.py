# SPDX-License-Identifier: Apache-2.0
"""The sequences of a beam search: who continues whom, and what waits for a row or for its siblings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from phalanx.runtime.request import Hypothesis, Logprob
from phalanx.runtime.scheduler.beam_search import BeamSearch, Candidates, Continuation
from phalanx.runtime.scheduler.sequences import Int32Array, Sequence, SequenceTable
from phalanx.runtime.text import TextStream

__all__ = ["Beam", "BeamGroup"]


@dataclass(slots=True, eq=False)
class Beam:
    """One beam and the sequence that computes it.

    Attributes:
        tokens: generated, with their log-probabilities; ``total`` is the sum of these.
        next_tokens: candidates for the next one; None until the step's result is there.
        text: of ``tokens``, if there are stop texts.
        parent: whose first ``num_shared`` tokens it takes over when it gets a row; None if it has one, or starts by itself.
    """

    sequence: Sequence
    group: BeamGroup
    tokens: tuple[Logprob, ...] = ()
    total: float = 0.0
    next_tokens: list[tuple[int, float]] | None = None
    text: TextStream | None = None
    parent: Beam | None = None
    num_shared: int = 0

    @property
    def is_running(self) -> bool:
        """Whether it has a row."""
        return self.sequence.seq_index >= 0


@dataclass(slots=True, eq=False)
class BeamGroup:
    """One request's beams. They advance together: none is computed further before all have their candidates.

    Attributes:
        leader: the request itself; its sequence computes the prompt.
        by_sequence: beams of all groups.
        followers: requests that get the next best answers, in order.
        beams: those that are searched on, best first.
    """

    leader: Sequence
    search: BeamSearch
    by_sequence: dict[Sequence, Beam]
    followers: list[Sequence] = field(default_factory=list)
    beams: list[Beam] = field(default_factory=list)
    _spare: list[Sequence] = field(default_factory=list)

    @classmethod
    def start(cls, leader: Sequence, by_sequence: dict[Sequence, Beam], text: TextStream | None = None) -> BeamGroup:
        """The group of a request that waits: one beam, with the prompt. ``text`` is that of an answer without a token."""
        search = BeamSearch(leader.request.params, frozenset(leader.end_token_ids))
        group = cls(leader, search, by_sequence)
        group.beams.append(Beam(leader, group, text=text))
        by_sequence[leader] = group.beams[0]
        return group

    @property
    def num_missing_rows(self) -> int:
        """Rows that it will take in addition to those it has."""
        return self.search.width - sum(beam.is_running for beam in self.beams)

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The answers, best first."""
        return self.search.hypotheses

    @property
    def is_complete(self) -> bool:
        """Whether all beams have their candidates."""
        return all(beam.next_tokens is not None for beam in self.beams)

    def advance(self, table: SequenceTable, release: Callable[[Sequence], None]) -> None:
        """Choose the next beams once `is_complete`. Those that are not continued are released, before their sequences serve others.

        A beam's best continuation keeps its row. The others get `parent`, and take over its cache when there is a row for them.
        """
        old = self.beams
        known = [table.known_tokens(beam.sequence.seq_index).copy() for beam in old]
        chosen = self.search.advance(
            [Candidates(beam.tokens, beam.total, beam.next_tokens or (), beam.text) for beam in old]
        )
        continued = {one.parent for one in chosen}
        for index, beam in enumerate(old):
            del self.by_sequence[beam.sequence]
            if index not in continued:
                release(beam.sequence)
                self._spare.append(beam.sequence)
        self.beams = []
        keepers: dict[int, Beam] = {}
        for one in chosen:
            tokens = (*old[one.parent].tokens, one.token)
            if one.parent not in keepers:
                beam = keepers[one.parent] = Beam(old[one.parent].sequence, self, tokens, one.total, text=one.text)
                table.append_one(beam.sequence.seq_index, one.token.token_id)
            else:
                beam = self._forked(keepers[one.parent], known[one.parent], tokens, one)
            self.by_sequence[beam.sequence] = beam
            self.beams.append(beam)

    def suspend(self, tokens: Items[Int32Array]) -> Sequence:
        """After all rows were taken: ``tokens`` are those of the beams. Returns the sequence that starts first, by itself."""
        first = self.beams[0]
        for beam, own in zip(self.beams, tokens, strict=True):
            beam.sequence.token_ids, beam.next_tokens = own, None
            beam.parent, beam.num_shared = None, 0
            if beam is not first:
                beam.parent, beam.num_shared = first, _common_prefix(tokens[0], own)
        return first.sequence

    def _forked(self, parent: Beam, known: Int32Array, tokens: tuple[Logprob, ...], one: Continuation) -> Beam:
        sequence = (
            self._spare.pop() if self._spare else dataclasses.replace(self.leader, prompt_logprobs=None, seq_index=-1)
        )
        sequence.token_ids = np.append(known, np.int32(one.token.token_id))
        sequence.keys = list(parent.sequence.keys)
        return Beam(sequence, self, tokens, one.total, text=one.text, parent=parent, num_shared=len(known))


def _common_prefix(first: Int32Array, second: Int32Array) -> int:
    """Leading tokens that are equal, and not all of either."""
    length = min(len(first), len(second)) - 1
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
