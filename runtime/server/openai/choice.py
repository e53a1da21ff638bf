# SPDX-License-Identifier: Apache-2.0
"""One of the answers that a request asked for, while it grows: engine deltas in, token events out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from phalanx.runtime.request import Logprob, SamplingParams, TokenDelta
from phalanx.runtime.text import TextStream, Tokenizer

__all__ = ["Choice", "TokenEvent"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token and the text that became certain with it.

    ``token_id`` is None where only the end is news. ``last`` marks a choice's last event.
    """

    token_id: int | None
    text: str = ""
    logprob: Logprob | None = None
    last: bool = False


@dataclass(slots=True)
class Choice:
    """State of one answer.

    Attributes:
        index: among all answers of the HTTP request.
        stream: its text; None without a tokenizer.
        finish_reason: None while it runs.
        error: why it failed, where it did.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: TextStream | None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[Logprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    events: list[TokenEvent] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        index: int,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> Choice:
        """An answer without tokens yet."""
        stream = None
        if tokenizer is not None:
            stream = tokenizer.text_stream(
                prompt_token_ids,
                stop=params.stop,
                include_stop=params.include_stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
        return cls(index, prompt_token_ids, params, stream)

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop text ended it, which the engine does not know."""
        return isinstance(self.stop_reason, str)

    def take(self, delta: TokenDelta) -> list[TokenEvent]:
        """What ``delta`` adds, one event a token."""
        self.num_cached_tokens = delta.num_cached_tokens or self.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        events: list[TokenEvent] = []
        for index, token_id in enumerate(delta.token_ids):
            logprob = delta.logprobs[index] if index < len(delta.logprobs) else None
            is_text = not (index + 1 == len(delta.token_ids) and delta.ends_with_stop_token(self.params))
            events.append(TokenEvent(token_id, self._push(token_id) if is_text else "", logprob))
            self.num_tokens += 1
            if self.stopped_by_text:
                events[-1] = replace(events[-1], last=True)
                return events
        if delta.finish_reason is not None:
            self._finish(delta, events)
        return events

    def _push(self, token_id: int) -> str:
        if self.stream is None:
            return ""
        piece = self.stream.push((token_id,))
        if piece.stop is not None:
            self.finish_reason, self.stop_reason = "stop", piece.stop
        return piece.text

    def _finish(self, delta: TokenDelta, events: list[TokenEvent]) -> None:
        self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error
        held = self.stream.finish() if self.stream is not None else ""
        last = events.pop() if events else TokenEvent(None)
        events.append(replace(last, text=last.text + held, last=True))
