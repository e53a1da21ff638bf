"""Beam search: which continuations of a prompt are kept, which have ended, and when no better one can come.

The definition is that of ``transformers``' ``generate(num_beams=...)``, so that both return the same sequences. A beam's total is the
sum of its tokens' log-probabilities. At each step the best ``num_candidates`` continuations of all beams are looked at: the best
``width`` of them that do not end are the next beams; those that end (in an end token or a stop sequence, as transformers' stopping
criteria), if they are among the first ``width``, become hypotheses with the score total / length ^ length_penalty, of which the best
``width`` are kept. At the length limit every continuation ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from phalanx.runtime.request import FinishReason, Hypothesis, Logprob, SamplingParams

__all__ = ["BeamSearch", "Candidates", "Continuation", "num_candidates"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One beam and the most probable next tokens.

    Attributes:
        tokens: those generated so far, with their log-probabilities.
        total: the sum of these.
        next_tokens: token id and log-probability, best first, `num_candidates` of them or the whole vocabulary.
    """

    tokens: tuple[Logprob, ...]
    total: float
    next_tokens: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next step: ``token`` after the beam with index ``parent``."""

    parent: int
    token: Logprob
    total: float


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
        stops = [self._stops(beams[one.parent], one.token.token_id, length) for one in best]
        ends = [is_stop or length >= self.params.max_tokens for is_stop in stops]
        for one, is_stop, is_end in zip(best[: self.width], stops, ends, strict=False):
            if is_end:
                self.hypotheses.append(
                    self._hypothesis(beams[one.parent], one, length, "stop" if is_stop else "length")
                )
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self.width :]
        running = [one for one, is_end in zip(best, ends, strict=True) if not is_end][: self.width]
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
            Continuation(index, self._logprob(beams[index], token_id, logprob), total)
            for total, index, token_id, logprob in all_continuations[: num_candidates(self.params, self.end_token_ids)]
        ]

    def _logprob(self, beam: Candidates, token_id: int, logprob: float) -> Logprob:
        return Logprob(token_id, logprob, tuple(beam.next_tokens[: self.params.logprobs or 0]))

    def _stops(self, beam: Candidates, token_id: int, length: int) -> bool:
        """Whether a continuation by ``token_id`` ends before the length limit."""
        if token_id in self.end_token_ids:
            return True
        if length <= self.params.min_tokens:
            return False
        return any(
            sequence[-1] == token_id and _ends_in(beam.tokens, sequence[:-1])
            for sequence in self.params.stop_token_sequences
        )

    def _hypothesis(self, beam: Candidates, last: Continuation, length: int, reason: FinishReason) -> Hypothesis:
        return Hypothesis((*beam.tokens, last.token), last.total, self._score(last.total, length), reason)

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
