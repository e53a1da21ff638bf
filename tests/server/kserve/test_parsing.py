"""What inputs of the models that generate become: words as texts and as the backend's lists of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.runtime.sampling.fields import SamplingParams
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.kserve.contract import MODELS
from phalanx.runtime.server.kserve.parsing import parse_rows


def sampling(model: str = "tensorrt_llm", **inputs: Any) -> SamplingParams:
    required: dict[str, Any] = (
        {"text_input": "a", "max_tokens": 5}
        if model == "ensemble"
        else {"input_ids": [3, 4], "input_lengths": 2, "request_output_len": 5}
    )
    (row,) = parse_rows(MODELS[model], [required | inputs], 100).rows
    return SamplingParams(**row.sampling)


def test_words_of_any_number_of_tokens() -> None:
    """All tokens in a row, where each word ends below, padded: the form that ``preprocessing`` gives."""
    words = [[5, 6, 7, 8, 9, 0], [3, 4, 5, -1, -1, -1]]
    params = sampling(stop_words_list=words, bad_words_list=words, end_id=2)
    assert params.bad_token_ids == ((5, 6, 7), (8,), (9,))
    assert (params.stop_token_sequences, params.stop_token_ids, params.ignore_eos) == (((5, 6, 7),), (8, 9, 2), True)
    assert sampling(stop_words_list=[[0], [-1]], bad_words_list=[[0], [-1]]) == sampling()


@pytest.mark.parametrize("ends", [[2, 2, -1], [3, 1, -1], [4, -1, -1]])
def test_words_that_end_nowhere_are_refused(ends: list[int]) -> None:
    for name in ("stop_words_list", "bad_words_list"):
        with pytest.raises(ApiError, match=f"{name} says that a word ends at"):
            sampling(**{name: [[5, 6, 7], ends]})


def test_empty_texts_mean_none() -> None:
    assert sampling("ensemble", bad_words=["", "x"], stop_words=[""]) == sampling("ensemble", bad_words=["x"])
    assert sampling("ensemble", bad_words=["x"]).bad_words == ("x",)


def test_penalties_have_the_backends_names() -> None:
    params = sampling("ensemble", repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=-1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.25, -1.0)


def test_biases_of_tokens_are_those_that_are_not_zero() -> None:
    assert sampling(embedding_bias=[0.0, 1.5, 0.0, -2.0]).logit_bias == ((1, 1.5), (3, -2.0))
    assert sampling(embedding_bias=[0.0] * 100) == sampling(embedding_bias=[]) == sampling()


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("tensorrt_llm", {"embedding_bias": [0.0] * 101}, "embedding_bias holds 101 numbers for 100 tokens"),
        ("tensorrt_llm", {"embedding_bias": [101.0]}, "embedding_bias=101.0 is out of range"),
        ("ensemble", {"embedding_bias_words": ["a"], "embedding_bias_weights": [1.0, 2.0]}, "holds 1 words for 2 weights"),
        ("ensemble", {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "holds 2 words for 1 weights"),
        ("ensemble", {"embedding_bias_words": ["a"]}, "holds 1 words for 0 weights"),
        ("ensemble", {"embedding_bias_weights": [1.0]}, "holds 0 words for 1 weights"),
    ],
)  # fmt: skip
def test_biases_that_fit_no_token_or_word_are_refused(model: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        sampling(model, **inputs)


def test_empty_words_and_weights_of_zero_ask_for_nothing() -> None:
    for inputs in (
        {"embedding_bias_weights": [0.0]},
        {"embedding_bias_words": [""], "embedding_bias_weights": []},
        {"embedding_bias_words": ["a"], "embedding_bias_weights": [0.0]},
    ):
        (row,) = parse_rows(MODELS["ensemble"], [{"text_input": "a", "max_tokens": 5, **inputs}], 100).rows
        assert row.bias_words == []
