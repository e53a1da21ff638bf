# SPDX-License-Identifier: Apache-2.0
"""Beam search: which continuations of a prompt are kept, which have ended, and when no better one can come.

The definition is that of ``transformers``' ``generate(num_beams=...)``, so that both return the same sequences. A beam's total is the
sum of its tokens' log-probabilities. At each step the best ``num_candidates`` continuations of all beams are looked at: the best
``width`` of them that do not end are the next beams; those that end (in an end token, or as by transformers' stopping criteria in a stop
sequence or text), if they are among the first ``width``, become hypotheses with the score total / length ^ length_penalty, of which the best
``width`` are kept. At the length limit every continuation ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from phalanx.runtime.request import FinishReason, Hypothesis, Logprob, SamplingParams
from phalanx.runtime.text import TextStream

__all__ = ["BeamSearch", "Candidates", "Continuation", "num_candidates"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One beam and the most probable next tokens.

    Attributes:
        tokens: those generated so far, with their log-probabilities.
        total: the sum of these.
        next_tokens: token id and log-probability, best first, `num_candidates` of them or the whole vocabulary.
        text: of ``tokens``; None if there are no stop texts.
    """

    tokens: tuple[Logprob, ...]
    total: float
    next_tokens: Sequence[tuple[int, float]]
    text: TextStream | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """``token`` after the beam with index ``parent``: a beam of the next step, or an answer.

    Attributes:
        finish_reason: why it ends; None = it does not.
        stop: the stop text in which it ends.
        text: with the token; None if it is not needed.
    """

    parent: int
    token: Logprob
    total: float
    finish_reason: FinishReason | None = None
    stop: str | None = None
    text: TextStream | None = None


@dataclass(slots=True)
class BeamSearch:
    """The search of one request.

    Attributes:
        params: beam_width, length_penalty, early_stopping, max_tokens, min_tokens, stop_token_sequences and logprobs count.
        end_token_ids: tokens that end a hypothesis.
        hypotheses: the best ones that have ended, best first.
        is_done: nothing that still runs can or may become one of them.
    """

    params: SamplingParams
    end_token_ids: frozenset[int]
    hypotheses: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False

    @property
    def width(self) -> int:
        """Beams at once, and hypotheses at the end."""
        return self.params.beam_width

    def advance(self, beams: Sequence[Candidates]) -> list[Continuation]:
        """Take in the next tokens of all beams; returns the beams of the next step, best first, none once the search is done."""
        length = len(beams[0].tokens) + 1
        best = self._best(beams, length)
        for one in best[: self.width]:
            if one.finish_reason is not None:
                self.hypotheses.append(self._hypothesis(beams[one.parent], one, one.finish_reason))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self.width :]
        running = [one for one in best if one.finish_reason is None][: self.width]
        self.is_done = not running or self._cannot_improve(running[0].total, length)
        return [] if self.is_done else running

    def _best(self, beams: Sequence[Candidates], length: int) -> list[Continuation]:
        banned = self.end_token_ids if length <= self.params.min_tokens else frozenset()
        all_continuations = [
            (beam.total + logprob, index, token_id, logprob)
            for index, beam in enumerate(beams)
            for token_id, logprob in beam.next_tokens
            if token_id not in banned
        ]
        all_continuations.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        return [
            self._continuation(index, beams[index], self._logprob(beams[index], token_id, logprob), total)
            for total, index, token_id, logprob in all_continuations[: num_candidates(self.params, self.end_token_ids)]
        ]

    def _logprob(self, beam: Candidates, token_id: int, logprob: float) -> Logprob:
        return Logprob(token_id, logprob, tuple(beam.next_tokens[: self.params.logprobs or 0]))

    def _continuation(self, parent: int, beam: Candidates, token: Logprob, total: float) -> Continuation:
        if token.token_id in self.end_token_ids or self._ends_in_sequence(beam.tokens, token.token_id):
            return Continuation(parent, token, total, "stop")
        text, stop = None, None
        if beam.text is not None:
            text = beam.text.fork()
            _, stop = text.step(token.token_id)
        if stop is not None:
            return Continuation(parent, token, total, "stop", stop)
        is_cut = len(beam.tokens) + 1 >= self.params.max_tokens
        return Continuation(parent, token, total, "length" if is_cut else None, text=text)

    def _ends_in_sequence(self, tokens: Sequence[Logprob], token_id: int) -> bool:
        """Whether ``token_id`` after ``tokens`` completes a stop sequence that counts there."""
        if len(tokens) < self.params.min_tokens:
            return False
        return any(
            sequence[-1] == token_id and _ends_in(tokens, sequence[:-1])
            for sequence in self.params.stop_token_sequences
        )

    def _hypothesis(self, beam: Candidates, last: Continuation, reason: FinishReason) -> Hypothesis:
        tokens = (*beam.tokens, last.token)
        return Hypothesis(tokens, last.total, self._score(last.total, len(tokens)), reason, last.stop)

    def _cannot_improve(self, best_total: float, length: int) -> bool:
        """Whether ``width`` hypotheses have ended and, as far as ``early_stopping`` looks, no running beam will pass the worst."""
        if len(self.hypotheses) < self.width:
            return False
        if self.params.early_stopping is True:
            return True
        looks_ahead = self.params.early_stopping == "never" and self.params.length_penalty > 0
        best_possible = self._score(best_total, self.params.max_tokens if looks_ahead else length)
        return best_possible <= self.hypotheses[-1].score

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.params.length_penalty)


def num_candidates(params: SamplingParams, end_token_ids: Iterable[int]) -> int:
    """Continuations looked at in a step: so many that ``beam_width`` of them do not end, whichever do."""
    ends = {*end_token_ids, *(sequence[-1] for sequence in params.stop_token_sequences)}
    return max(2, 1 + len(ends)) * params.beam_width


def _ends_in(tokens: Sequence[Logprob], sequence: Sequence[int]) -> bool:
    """Whether the last ones of ``tokens`` are ``sequence``."""
    if len(tokens) < len(sequence):
        return False
    return all(token.token_id == wanted for token, wanted in zip(reversed(tokens), reversed(sequence), strict=False))
