"""Beam search on small random models: against every sequence there is, and against the definition written out plainly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.scheduler.beam_search import BeamSearch, Candidates, num_candidates
from phalanx.runtime.text import TextStream

VOCABULARY = 4


class Model:
    """Log-probabilities of the next token, random for each sequence."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        self._seed, self._vocabulary = seed, vocabulary

    def __call__(self, tokens: tuple[int, ...]) -> list[float]:
        logits = np.random.default_rng([self._seed, *tokens]).normal(size=self._vocabulary)
        return (logits - np.log(np.exp(logits).sum())).tolist()  # type: ignore[no-any-return]


class Letters:
    """A detokenizer: each token is a letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return ""

    def fork(self) -> Letters:
        return self


def search(model: Model, params: SamplingParams, ends: frozenset[int]) -> BeamSearch:
    """Run a search to its end, with as many candidates as executors report."""
    found = BeamSearch(params, ends)
    text = TextStream(Letters(), params.stop, min_tokens=params.min_tokens) if params.stop else None
    beams = [Candidates((), 0.0, [], text)]
    while not found.is_done:
        count = num_candidates(params, ends)
        known = []
        for beam in beams:
            logprobs = model(tuple(token.token_id for token in beam.tokens))
            best = sorted(enumerate(logprobs), key=lambda pair: -pair[1])[:count]
            known.append(Candidates(beam.tokens, beam.total, best, beam.text))
        beams = [
            Candidates((*known[one.parent].tokens, one.token), one.total, [], one.text) for one in found.advance(known)
        ]  # fmt: skip
    return found


def sequences(model: Model, length: int, ends: frozenset[int]) -> dict[tuple[int, ...], float]:
    """Every complete answer and its log-probability."""
    found = {}
    for tokens in itertools.chain.from_iterable(
        itertools.product(range(VOCABULARY), repeat=count) for count in range(1, length + 1)
    ):
        first_end = next((index for index, token in enumerate(tokens) if token in ends), None)
        if first_end == len(tokens) - 1 or (first_end is None and len(tokens) == length):
            found[tokens] = math.fsum(model(tokens[:index])[token] for index, token in enumerate(tokens))
    return found


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@given(seed=st.integers(0, 10_000), ends=st.sets(st.integers(0, VOCABULARY - 1), max_size=2))
def test_wide_enough_it_finds_the_best_of_all_answers(length_penalty: float, seed: int, ends: set[int]) -> None:
    model, length = Model(seed), 3
    params = SamplingParams(
        max_tokens=length, beam_width=32, length_penalty=length_penalty, early_stopping="never", temperature=0.0
    )
    found = search(model, params, frozenset(ends))
    scored = {
        tokens: total / len(tokens) ** length_penalty
        for tokens, total in sequences(model, length, frozenset(ends)).items()
    }
    best = sorted(scored, key=lambda tokens: -scored[tokens])[: len(found.hypotheses)]
    assert [hypothesis.token_ids for hypothesis in found.hypotheses] == best
    assert [hypothesis.score for hypothesis in found.hypotheses] == pytest.approx([scored[tokens] for tokens in best])


def stops(tokens: tuple[int, ...], params: SamplingParams) -> bool:
    """Whether an answer ends in a stop sequence or text."""
    text = Letters().extend(tokens[max(params.min_tokens - 1, 0) :])
    if any(text.endswith(stop) for stop in params.stop):
        return True
    ends = any(tokens[-len(sequence) :] == sequence for sequence in params.stop_token_sequences)
    return ends and len(tokens) > params.min_tokens


def plain_search(model: Model, params: SamplingParams, ends: set[int]) -> list[tuple[int, ...]]:
    """The definition on whole lists: no candidates, no parents. Any number of tokens may complete a text, so there, as in transformers, a
    step looks at so many continuations only."""
    width, length = params.beam_width, params.max_tokens
    penalty, early = params.length_penalty, params.early_stopping
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for now in range(1, length + 1):
        grown = sorted(
            ((total + logprob, (*tokens, token)) for total, tokens in running for token, logprob in enumerate(model(tokens))),
            key=lambda entry: -entry[0],
        )  # fmt: skip
        if params.stop:
            last_tokens = ends | {sequence[-1] for sequence in params.stop_token_sequences}
            grown = grown[: max(2, 1 + len(last_tokens)) * width]
        ended = [now == length or tokens[-1] in ends or stops(tokens, params) for _, tokens in grown]
        finished += [
            (entry[0] / now**penalty, entry[1]) for entry, is_end in zip(grown[:width], ended, strict=False) if is_end
        ]
        finished = sorted(finished, key=lambda entry: -entry[0])[:width]
        running = [entry for entry, is_end in zip(grown, ended, strict=True) if not is_end][:width]
        if not running:
            break
        reach = length if early == "never" and penalty > 0 else now
        if len(finished) == width and (early is True or running[0][0] / reach**penalty <= finished[-1][0]):
            break
    return [tokens for _, tokens in finished]


@given(
    seed=st.integers(0, 10_000), width=st.integers(2, 5), length=st.integers(1, 8), ends=st.sets(st.integers(0, 6), max_size=3),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), early=st.sampled_from([True, False, "never"]),
    sequences=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=3), least=st.integers(0, 3),
    texts=st.lists(st.text("abcdefg", min_size=1, max_size=3), max_size=2),
)  # fmt: skip
def test_it_keeps_the_definition_at_any_width_and_length(
    seed: int,
    width: int,
    length: int,
    ends: set[int],
    penalty: float,
    early: Any,
    sequences: list[list[int]],
    least: int,
    texts: list[str],
) -> None:
    model = Model(seed, vocabulary=7)
    params = SamplingParams(
        max_tokens=length, beam_width=width, length_penalty=penalty, early_stopping=early, stop_token_sequences=sequences,
        min_tokens=0 if ends else min(least, length), stop=texts,
    )  # fmt: skip
    found = search(model, params, frozenset(ends))
    assert [hypothesis.token_ids for hypothesis in found.hypotheses] == plain_search(model, params, ends)
    for hypothesis in found.hypotheses:
        is_stop = hypothesis.token_ids[-1] in ends or stops(hypothesis.token_ids, params)
        assert hypothesis.finish_reason == ("stop" if is_stop else "length")


def test_end_tokens_are_passed_over_before_min_tokens() -> None:
    params = SamplingParams(max_tokens=6, min_tokens=3, beam_width=3)
    found = search(Model(5), params, frozenset({0, 1}))
    assert min(len(hypothesis.tokens) for hypothesis in found.hypotheses) > 3
