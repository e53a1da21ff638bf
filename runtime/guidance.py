# SPDX-License-Identifier: Apache-2.0
"""Guides at work: compiled by llguidance into a parser that knows, after each token, which may follow.

A parser's masks are computed on threads (llguidance holds no interpreter lock there), so that a sequence whose mask takes long does not
hold up the others: the scheduler plans it when the mask is there. What compiling and one mask may cost is bounded by llguidance's own
counters, which do not depend on the machine.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.sampling.mask_sizes import mask_words
from phalanx.runtime.text import Tokenizer

__all__ = ["FIELD", "JSON_WHITESPACE", "GuideCompiler", "GuideMask", "check_guide"]

Int32Array = NDArray[np.int32]

FIELD = "structured_outputs"

JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of a JSON text: without a limit a model may go on with nothing else."""

_MOST_KEPT = 32

_TOKEN, _ANY_TOKEN = re.compile(r"<\[[\d,^*-]+\]>"), "<|tool|>"
"""How a grammar names tokens by their ids, and one of llguidance's tokenizer for bytes that may stand for each of them."""

_CHECKED_ITEMS = 5_000
"""Of llguidance's 50,000 items a mask: tokens of several bytes take several times as many as single bytes."""


class GuideCompiler:
    """Compiles guides for one tokenizer.

    Args:
        tokenizer: reads the checkpoint's, at the first guide; None if there is none.
        end_token_ids: tokens that end an answer; a complete one may be followed by none but these. Those that the tokenizer does
            not have do not count.
    """

    def __init__(
        self, tokenizer: Callable[[], Tokenizer | None], vocab_size: int, end_token_ids: tuple[int, ...]
    ) -> None:
        self._read_tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, end_token_ids
        self._compiled = functools.lru_cache(_MOST_KEPT)(self._compile)
        self._threads = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2)), "guides")
        self._tokenizer: Future[Any] | None = None

    def start(self, guide: Guide) -> GuideMask:
        """The masks of a new sequence; does not wait for the first."""
        self._tokenizer = self._tokenizer or self._threads.submit(self._make_tokenizer)
        return GuideMask(self._threads, lambda: self.matcher(guide), self._vocab_size, guide.name)

    def prepare(self) -> None:
        """Read the tokenizer on a thread, before the first guide needs it; does nothing where llguidance is not installed.

        With 256,000 tokens that takes some seconds, most of them with the interpreter lock, so a server does it before it is ready.
        """
        if self._tokenizer is None and find_spec("llguidance") is not None:
            self._tokenizer = self._threads.submit(self._make_tokenizer)

    def matcher(self, guide: Guide) -> Any:
        """A parser at the start of an answer, for a thread.

        Raises:
            RequestError: the guide cannot be compiled or is too large; there is no tokenizer; llguidance is not installed.
        """
        return self._compiled(guide).deep_copy()

    def _compile(self, guide: Guide) -> Any:
        assert self._tokenizer is not None
        return _compile(self._tokenizer.result(), guide)

    def _make_tokenizer(self) -> Any:
        tokenizer = self._read_tokenizer()
        if tokenizer is None:
            raise RequestError(f"{FIELD} needs text, but the checkpoint has no tokenizer.json; leave it out", FIELD)
        ends = [token for token in self._end_token_ids if token < min(tokenizer.vocab_size, self._vocab_size)]
        if not ends:
            raise RequestError(f"{FIELD} needs an end token, but the tokenizer has none; leave it out", FIELD)
        try:
            return _library().LLTokenizer(tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=ends)
        except ValueError as error:
            raise RequestError(f"{FIELD} cannot be used with this checkpoint's tokenizer: {error}", FIELD) from None


def check_guide(guide: Guide) -> None:
    """Compile a guide for the bytes of a text, and compute its first mask. Tokens that it names by their ids are all taken for one.

    Raises:
        RequestError: it cannot be compiled, is too large, or nothing can match it; llguidance is not installed.
    """
    tokenizer = _library().LLTokenizer("byte")
    if guide.kind == "grammar":
        guide = replace(guide, text=_TOKEN.sub(_ANY_TOKEN, guide.text))
    _next_mask(_compile(tokenizer, guide, step_max_items=_CHECKED_ITEMS), tokenizer.vocab_size, guide.name)


def _compile(tokenizer: Any, guide: Guide, **stricter: int) -> Any:
    library = _library()
    limits = library.LLParserLimits(
        max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False, **stricter
    )  # fmt: skip
    try:
        grammar = _grammar(library, guide)
    except (ValueError, RecursionError) as error:
        raise _refusal(guide.name, str(error)) from None
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise _refusal(guide.name, matcher.get_error())
    return matcher


class GuideMask:
    """Tokens that keep an answer within a grammar, schema or regular expression. Not thread-safe."""

    follows_tokens = True

    def __init__(self, threads: ThreadPoolExecutor, begin: Callable[[], Any], vocab_size: int, name: str) -> None:
        self._threads, self._vocab_size, self._name = threads, vocab_size, name
        self._matcher: Any = None
        self._next: Future[Int32Array] = threads.submit(self._begin, begin)

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there."""
        return self._next.done() and self._next.exception() is None

    @property
    def problem(self) -> str | None:
        """Why there is no next mask, once that is known."""
        error = self._next.exception() if self._next.done() else None
        return None if error is None else str(error)

    def wait(self, seconds: float) -> None:
        """Wait for the next mask, but not for longer."""
        with suppress(NotYet):
            self._next.exception(seconds)

    def words(self) -> Int32Array:
        """The next mask; waits for it."""
        return self._next.result()

    def accept(self, token_id: int) -> None:
        """Begin with the mask after a token."""
        self._next = self._threads.submit(self._advance, token_id)

    def _begin(self, begin: Callable[[], Any]) -> Int32Array:
        self._matcher = begin()
        return _next_mask(self._matcher, self._vocab_size, self._name)

    def _advance(self, token_id: int) -> Int32Array:
        if not self._matcher.consume_token(token_id):
            raise RequestError(
                f"token {token_id} does not fit {self._name}: biases or bad words left no token that does", self._name
            )
        return _next_mask(self._matcher, self._vocab_size, self._name)


def _next_mask(matcher: Any, vocab_size: int, name: str) -> Int32Array:
    words = np.zeros(mask_words(vocab_size), np.int32)
    packed = np.frombuffer(matcher.compute_bitmask(), np.int32)
    if matcher.is_error():
        raise _refusal(name, matcher.get_error())
    words[: len(packed)] = packed[: len(words)]
    return words


def _grammar(library: Any, guide: Guide) -> str:
    make = library.LLMatcher
    text: str = guide.text
    if guide.kind == "json":
        grammar: str = make.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_WHITESPACE})
    elif guide.kind == "regex":
        grammar = make.grammar_from_regex(text)
    elif guide.kind == "choice":
        grammar = make.grammar_from_lark(
            "start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in json.loads(text))
        )
    else:
        grammar = make.grammar_from_lark(_gbnf_to_lark(text) if "::=" in text else text)
    return grammar


def _gbnf_to_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    lark: str = any_to_lark(text)
    return lark


def _refusal(name: str, reason: str) -> RequestError:
    first = reason.strip().splitlines()[0] if reason.strip() else "nothing can match it"
    return RequestError(f"{name} cannot be compiled: {first[:200]}; simplify it", name)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            f"{FIELD} needs llguidance; install the extra [guided] in Phalanx's checkout (pip install -e '.[guided]')",
            FIELD,
        ) from None
    return llguidance
