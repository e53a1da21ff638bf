# SPDX-License-Identifier: Apache-2.0
"""One growing answer: the engine's deltas in, text and tokens out, until an end token, a stop text or a limit ends it.

`LLM` and every protocol of the server read answers through this class, so that they agree on what counts as text, which tokens
belong to an answer and why it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from phalanx.runtime.request import FinishReason, Hypothesis, Logprob, RequestOutput, SamplingParams, TokenDelta
from phalanx.runtime.text import TextStream, Tokenizer

__all__ = ["Answer", "TokenEvent", "text_stream"]


class TokenEvent(msgspec.Struct, frozen=True):
    """One token and the text that became certain with it. A struct, because one is made for each token of every stream.

    ``token_id`` is None if the event only marks the end or brings text that was held back. ``last`` marks an answer's last event.
    """

    token_id: int | None
    text: str = ""
    logprob: Logprob | None = None
    last: bool = False


@dataclass(slots=True)
class Answer:
    """State of one answer.

    Attributes:
        index: among all answers of a call or of an HTTP request.
        stream: its text; None without a tokenizer.
        num_tokens: tokens so far, an end token and those of a stop text included.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
        finish_reason: None while it runs.
        stop_reason: the stop text, or the token of ``stop_token_ids``, that ended it.
        error: why it failed, if it did.
        error_param: the field of the request that is at fault; None = none is.
        hypotheses: all answers of a beam search, best first.
        events: all events so far, if they were added by `collect`.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: TextStream | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[Logprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_param: str | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    events: list[TokenEvent] = field(default_factory=list)

    @classmethod
    def start(
        cls, index: int, prompt_token_ids: tuple[int, ...], params: SamplingParams, tokenizer: Tokenizer | None
    ) -> Answer:
        """Begin an answer without tokens."""
        answer = cls(index, prompt_token_ids, params)
        answer.begin_text(tokenizer)
        return answer

    def begin_text(self, tokenizer: Tokenizer | None) -> None:
        """Make text of the tokens from now on."""
        if tokenizer is not None:
            self.stream = text_stream(tokenizer, self.prompt_token_ids, self.params)

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop text ended it. The engine does not see texts, so it has to be told."""
        return isinstance(self.stop_reason, str)

    def push(self, token_id: int) -> str:
        """Add a plain next token and return the text that became certain. It may end the answer by a stop text."""
        self.num_tokens += 1
        if self.stream is None:
            return ""
        text, stop = self.stream.step(token_id)
        if stop is not None:
            self._stop(stop)
        return text

    @property
    def is_plain_text(self) -> bool:
        """Whether it has a text that plain next tokens cannot end, so that `extend_text` takes them."""
        return self.stream is not None and not self.stream.has_stops and self.finish_reason is None

    def extend_text(self, token_ids: Sequence[int]) -> str:
        """Add plain next tokens and return the text that became certain, without an event for each."""
        assert self.stream is not None
        self.num_tokens += len(token_ids)
        return self.stream.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> list[TokenEvent]:
        """Add plain next tokens and return an event for each. What comes after a stop text does not count."""
        events = []
        for token_id in token_ids:
            text = self.push(token_id)
            if self.finish_reason is not None:
                events.append(TokenEvent(token_id, text, last=True))
                break
            events.append(TokenEvent(token_id, text))
        return events

    def take(self, delta: TokenDelta) -> list[TokenEvent]:
        """Add a delta and return an event for each of its tokens. What comes after a stop text does not count."""
        self.num_cached_tokens = delta.num_cached_tokens or self.num_cached_tokens
        self.hypotheses = delta.hypotheses or self.hypotheses
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        events: list[TokenEvent] = []
        last = len(delta.token_ids) - 1
        for index, token_id in enumerate(delta.token_ids):
            logprob = delta.logprobs[index] if index < len(delta.logprobs) else None
            if index == last and delta.ends_with_stop_token(self.params):
                self.num_tokens += 1
                events.append(TokenEvent(token_id, "", logprob))
                break
            events.append(TokenEvent(token_id, self.push(token_id), logprob))
            if self.stopped_by_text:
                events[-1] = replace(events[-1], last=True)
                return events
        if delta.finish_reason is not None:
            self._finish(delta, delta.finish_reason, events)
        return events

    def collect(self, delta: TokenDelta) -> list[TokenEvent]:
        """Do the same as `take` and keep the events."""
        events = self.take(delta)
        self.events += events
        return events

    def output(self) -> RequestOutput:
        """The finished answer of `collect`."""
        assert self.finish_reason is not None
        tokens = [event for event in self.events if event.token_id is not None]
        return RequestOutput(
            index=self.index,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(event.token_id for event in tokens if event.token_id is not None),
            text=None if self.stream is None else "".join(event.text for event in self.events),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None
            if self.params.logprobs is None
            else tuple(e.logprob for e in tokens if e.logprob is not None),
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
            hypotheses=self.hypotheses,
        )

    def fail(self, error: str) -> None:
        """End it with an error before it had a delta."""
        self.finish_reason, self.error = "error", error

    def _stop(self, stop: str) -> None:
        self.finish_reason, self.stop_reason = "stop", stop

    def _finish(self, delta: TokenDelta, reason: FinishReason, events: list[TokenEvent]) -> None:
        self.finish_reason, self.stop_reason = reason, delta.stop_reason
        self.error, self.error_param = delta.error, delta.error_param
        held = ""
        if self.stream is not None:
            piece = self.stream.finish()
            held = piece.text
            if piece.stop is not None and reason in ("stop", "length"):
                self._stop(piece.stop)
        last = events.pop() if events else TokenEvent(None)
        events.append(replace(last, text=last.text + held, last=True))


def text_stream(tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...], params: SamplingParams) -> TextStream:
    """Return the growing text of an answer, without a token yet."""
    return tokenizer.text_stream(
        prompt_token_ids,
        stop=params.stop,
        include_stop=params.include_stop,
        min_tokens=params.min_tokens,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )
