# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities in the two shapes of the OpenAI protocol, and those of prompts in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from phalanx.runtime.request import Logprob
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.detokenizer import Detokenizer

__all__ = ["CompletionLogprobs", "chat_logprob", "prompt_logprobs"]

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's own stand-in."""
_TOKENS_AT_ONCE = 256


class CompletionLogprobs:
    """Parallel lists, collected token by token: ``tokens, token_logprobs, top_logprobs, text_offset``."""

    def __init__(self, tokenizer: Tokenizer | None, text: Detokenizer | None, num_alternatives: int) -> None:
        """``text`` counts the characters before each token; it starts where the reported text does."""
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._text = text
        self._offset = 0
        self._labels: dict[int, str] = {}
        self._lists = _empty_lists()

    def add(self, token_id: int, logprob: Logprob | None) -> None:
        """The next token; without a log-probability where it has none (the first of a prompt)."""
        self._lists["tokens"].append(self._label(token_id))
        self._lists["text_offset"].append(self._offset)
        self._lists["token_logprobs"].append(None if logprob is None else _finite(logprob.logprob))
        self._lists["top_logprobs"].append(None if logprob is None else self._top(logprob))
        if self._text is not None:
            self._offset += len(self._text.push(token_id))

    def take(self) -> dict[str, list[Any]]:
        """The lists since the last call."""
        lists, self._lists = self._lists, _empty_lists()
        return lists

    def _top(self, logprob: Logprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, value in (*logprob.top[: self._num_alternatives], (logprob.token_id, logprob.logprob)):
            top.setdefault(self._label(token_id), _finite(value))
        return top

    def _label(self, token_id: int) -> str:
        if (label := self._labels.get(token_id)) is None:
            label = self._labels[token_id] = _label(self._tokenizer, token_id)
        return label


def chat_logprob(tokenizer: Tokenizer | None, logprob: Logprob) -> dict[str, Any]:
    """One entry of ``choices[].logprobs.content``."""
    return {
        **_chat_token(tokenizer, logprob.token_id, logprob.logprob),
        "top_logprobs": [_chat_token(tokenizer, token_id, value) for token_id, value in logprob.top],
    }


def prompt_logprobs(
    tokenizer: Tokenizer | None, logprobs: Sequence[Logprob | None], num_alternatives: int
) -> msgspec.Raw:
    """JSON of one entry for each token of a prompt in vLLM's shape: by token id, the token itself first, then the alternatives; null for the first.

    A token's ``rank`` is its place among the alternatives, from 1; null where it is not one of them. It is written some tokens at a
    time, as one call would keep the interpreter to itself.
    """
    texts: dict[int, str | None] = {}
    parts = [
        msgspec.json.encode(
            [_ranked(tokenizer, each, num_alternatives, texts) for each in logprobs[begin : begin + _TOKENS_AT_ONCE]]
        )[1:-1]
        for begin in range(0, len(logprobs), _TOKENS_AT_ONCE)
    ]
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


def _ranked(
    tokenizer: Tokenizer | None, logprob: Logprob | None, num_alternatives: int, texts: dict[int, str | None]
) -> dict[str, dict[str, Any]] | None:
    """``texts``: those of tokens that were needed before."""
    if logprob is None:
        return None
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(logprob.top, 1)}
    ranked = {}
    for token_id, value in ((logprob.token_id, logprob.logprob), *logprob.top[:num_alternatives]):
        if token_id not in texts:
            texts[token_id] = None if tokenizer is None else tokenizer.token_bytes(token_id).decode(errors="replace")
        ranked[str(token_id)] = {
            "logprob": _finite(value),
            "rank": ranks.get(token_id),
            "decoded_token": texts[token_id],
        }
    return ranked


def _chat_token(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    if tokenizer is None:
        return {"token": f"token_id:{token_id}", "logprob": _finite(logprob), "bytes": None}
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _label(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token's text; its bytes spelt out where they are only part of a character, so that labels differ."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _empty_lists() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
