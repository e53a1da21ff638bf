# SPDX-License-Identifier: Apache-2.0
"""Words as lists of tokens, for fields that name texts but work on tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from phalanx.runtime.sampling.fields import SamplingParams
from phalanx.runtime.text.tokenizer import Tokenizer

__all__ = ["with_word_tokens", "word_biases", "word_token_ids"]


def with_word_tokens(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """``params`` with ``bad_words`` as ``bad_token_ids``; unchanged if there are none, or no tokenizer.

    Raises:
        RequestError: they are more tokens than a sequence may have.
    """
    if tokenizer is None or not params.bad_words:
        return params
    token_ids = (*params.bad_token_ids, *word_token_ids(tokenizer, params.bad_words))
    return dataclasses.replace(params, bad_words=(), bad_token_ids=tuple(dict.fromkeys(token_ids)))


def word_biases(tokenizer: Tokenizer, words: Iterable[tuple[str, float]]) -> dict[int, float]:
    """Return what words with a number each add to logits: each token of a word gets its number, one of several words their sum."""
    biases: dict[int, float] = {}
    for word, number in words:
        for token_id in tokenizer.encode(word, add_special_tokens=False):
            biases[token_id] = biases.get(token_id, 0.0) + number
    return biases


def word_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word at the start of a text, after a space, and after a new line, where no tokenizer adds a space."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    found: dict[tuple[int, ...], None] = {}
    for word in (word.lstrip() or word for word in words):
        for text in (word, f" {word}"):
            found[tokenizer.encode(text, add_special_tokens=False)] = None
        after_newline = tokenizer.encode(f"\n{word}", add_special_tokens=False)
        if after_newline[: len(newline)] == newline:
            found[after_newline[len(newline) :]] = None
    return tuple(token_ids for token_ids in found if token_ids)
