# SPDX-License-Identifier: Apache-2.0
"""Scoring a text in windows: what a model gives for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phalanx.launch.progress import Progress
from phalanx.parallel.errors import RequestError

if TYPE_CHECKING:
    from phalanx.runtime.executors.scored_logits import LogitsReader
    from phalanx.runtime.llm import LLM
    from phalanx.runtime.request import Logprob, TokenDelta
    from phalanx.runtime.text import Tokenizer

__all__ = ["Window", "check_windows", "encode", "scored_tokens", "windows_over"]

WINDOWS_AT_ONCE = 64
"""Windows whose results are held at one time; bounds memory on long texts."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``stop`` of the text, seen together; those from ``first_scored`` on count."""

    start: int
    stop: int
    first_scored: int


def windows_over(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of ``num_tokens`` but the first once; ``stride`` is below ``context``."""
    start, scored = 0, 1
    while scored < num_tokens:
        stop = min(start + context, num_tokens)
        yield Window(start, stop, scored)
        start, scored = start + stride, stop


def encode(tokenizer: Tokenizer | None, text: str) -> tuple[list[int], int]:
    """The text's tokens after the tokenizer's own begin token, if it has one, and the bytes that are scored.

    Raises:
        RequestError: no tokenizer, or a text of fewer than two tokens.
    """
    if tokenizer is None:
        raise RequestError("the checkpoint has no tokenizer.json, so a text cannot be scored; add it to the directory")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.encode(text)[:1]
    unscored = 0
    if begin == token_ids[:1]:
        unscored = len(tokenizer.decode(begin, skip_special_tokens=False).encode())
    else:
        token_ids = (*begin, *token_ids)
    if len(token_ids) < 2:
        raise RequestError("the text has fewer than two tokens, so nothing can be scored; give a longer one")
    return list(token_ids), len(text.encode()) - unscored


def scored_tokens(
    llm: LLM, token_ids: Sequence[int], context: int, stride: int, reader: LogitsReader | None = None
) -> Iterator[list[Logprob]]:
    """Log-probabilities of every token but the first, in order, a list for each window. *Collective.*

    Every token is scored once, by the first window that holds it. Progress goes to standard error.

    Args:
        context, stride: tokens of a window, and from one window's start to the next's.
        reader: shown all logits; a window's number in `windows_over` is its seed.

    Raises:
        RequestError: windows that do not fit the model, or logits that are not finite.
    """
    from phalanx.runtime.request import SamplingParams

    check_windows(context, stride, llm.max_model_len)
    windows = list(windows_over(len(token_ids), context, stride))
    params = [SamplingParams(max_tokens=0, prompt_logprobs=0, seed=number) for number in range(len(windows))]
    # With replicas it shows the first one's share.
    with Progress("scoring", (len(token_ids) - 1) // llm.layout.dp, "tokens", shown=llm.is_leader) as progress:
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            batch = windows[first : first + WINDOWS_AT_ONCE]
            prompts = [token_ids[window.start : window.stop] for window in batch]
            with nullcontext() if reader is None else llm.reading_logits(reader):
                outputs = llm.run(prompts, params[first : first + len(batch)], _advance(progress, batch))
            for window, output in zip(batch, outputs, strict=True):
                if output.error is not None:
                    raise RequestError(f"tokens {window.start} to {window.stop} of the text: {output.error}")
                assert output.prompt_logprobs is not None
                scored = output.prompt_logprobs[window.first_scored - window.start :]
                yield [item for item in scored if item is not None]


def check_windows(context: int, stride: int, longest: int) -> None:
    """Raise `RequestError` for windows that do not fit a model whose longest sequence has ``longest`` tokens."""
    if not 2 <= context <= longest:
        raise RequestError(
            f"--context={context} is outside 2 to {longest}, the longest sequence of this model and cache"
        )
    if not 1 <= stride < context:
        raise RequestError(
            f"--stride={stride} is outside 1 to {context - 1}; a window must begin with a token of the one before it"
        )


def _advance(progress: Progress, windows: Sequence[Window]) -> Callable[[int, TokenDelta, str], None]:
    """What `LLM.run` calls as windows of this batch end."""

    def advance(index: int, delta: TokenDelta, text: str) -> None:
        if delta.finish_reason is not None:
            progress.advance(windows[index].stop - windows[index].first_scored)

    return advance
