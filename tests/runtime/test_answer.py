"""One growing answer, as `LLM` and the server read it: which tokens count, which text is shown, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from phalanx.runtime.answer import Answer
from phalanx.runtime.request import FinishReason, Logprob, SamplingParams, TokenDelta
from phalanx.runtime.text import TextStream, Tokenizer
from tests.text import tokenizers_for_tests as made

TOKENIZER = Tokenizer(made.byte_level(), {}, None)


def start(**fields: Any) -> Answer:
    return Answer.start(0, (), SamplingParams(max_tokens=50, **fields), TOKENIZER)


def ids_of(text: str) -> tuple[int, ...]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def grow(answer: Answer, text: str, reason: FinishReason | None = "length", per_delta: int = 1) -> Answer:
    ids = ids_of(text)
    for start in range(0, len(ids), per_delta):
        if answer.finish_reason is not None:
            break
        part = ids[start : start + per_delta]
        answer.collect(TokenDelta("0", part, finish_reason=reason if start + per_delta >= len(ids) else None))
    return answer


@pytest.mark.parametrize("per_delta", [1, 2, 100])
def test_a_stop_text_ends_it_and_what_follows_does_not_count(per_delta: int) -> None:
    output = grow(start(stop="END"), "a END b", per_delta=per_delta).output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("a ", "stop", "END")
    assert output.token_ids == ids_of("a END b")[: len(output.token_ids)]
    assert len(output.token_ids) < len(ids_of("a END b"))


class HoldsBack:
    """A detokeniser that gives out everything at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._ids = tokenizer, []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def extend(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        return ""

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "a "), (True, "a END")])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_stop_text_found_when_held_text_is_given_out_says_stop(
    include_stop: bool, text: str, reason: FinishReason
) -> None:
    answer = start(stop="END", include_stop=include_stop)
    answer.stream = TextStream(HoldsBack(TOKENIZER), ("END",), include_stop=include_stop)
    output = grow(answer, "a END b", reason, per_delta=100).output()
    assert (output.finish_reason, output.stop_reason) == ("stop", "END")
    assert output.text == text


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_held_text_does_not_hide_a_failure(reason: FinishReason) -> None:
    answer = start(stop="END")
    answer.stream = TextStream(HoldsBack(TOKENIZER), ("END",))
    assert grow(answer, "a END b", reason, per_delta=100).output().finish_reason == reason


def test_an_end_token_counts_but_is_no_text() -> None:
    answer = start()
    answer.collect(TokenDelta("0", ids_of("ab"), finish_reason="stop"))
    assert answer.num_tokens == len(ids_of("ab"))
    assert answer.output().text == TOKENIZER.decode(ids_of("ab")[:-1])


def test_plain_tokens_by_push_and_by_delta_are_the_same() -> None:
    one, other = start(stop="END"), start(stop="END")
    texts = [one.push(token) for token in ids_of("so END")]
    events = [event for token in ids_of("so END") for event in other.take(TokenDelta("0", (token,)))]
    assert texts == [event.text for event in events]
    assert (one.finish_reason, one.stop_reason, one.num_tokens) == (
        other.finish_reason,
        other.stop_reason,
        other.num_tokens,
    )


def test_log_probabilities_stay_with_their_tokens() -> None:
    answer = start(logprobs=0, stop="b")
    ids = ids_of("abc")
    answer.collect(TokenDelta("0", ids, tuple(Logprob(token, -1.0) for token in ids), finish_reason="length"))
    output = answer.output()
    assert [entry.token_id for entry in output.logprobs or ()] == list(output.token_ids)
