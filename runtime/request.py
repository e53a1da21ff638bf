# SPDX-License-Identifier: Apache-2.0
"""What a client asks for and what it gets back, as frozen values; validated when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from phalanx.runtime.sampling.fields import MAX_LOGPROBS, SamplingParams

__all__ = [
    "MAX_LOGPROBS",
    "FinishReason",
    "Hypothesis",
    "Logprob",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenDelta",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, as the engine sees it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None
    """Monotonic time in seconds after which the request ends with an error; None = never."""
    fork_from: str | None = None
    """Id of a request with the same prompt, submitted before: the prompt is then computed once for both, as long as that one runs
    or waits. It changes no result. Of a beam search: this request gets its next best answer."""
    cache_salt: str = ""
    """Prefixes in the cache are shared only between requests of one salt."""
    priority: int = 0
    """Lower ones start first and are preempted last; among equal ones the order of arrival counts. Other than 0 only where the
    scheduler's policy is ``priority``."""
    num_followers: int = 0
    """Of a beam search: requests that are still to name this one in ``fork_from``. The search gives its answers once all have come,
    as it may be over before the last of them has arrived."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the model's own distribution, before temperature and filters.

    ``top`` holds the most probable alternatives, most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One answer of a beam search: its tokens, the sum of their log-probabilities, and the score by which answers are ordered.

    ``stop`` is the stop text in which it ended, if it did.
    """

    tokens: tuple[Logprob, ...]
    total: float
    score: float
    finish_reason: FinishReason
    stop: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens, an end token included."""
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one request. The last one of a request has a finish reason."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    """Given once, with the first token (or at the end when max_tokens = 0); the first prompt token has None."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    """All answers of a beam search, best first; this delta's tokens are those of one of them."""
    error_param: str | None = None
    """The field of the request that ``error`` is about; None = the request is not at fault."""

    def ends_with_stop_token(self, params: SamplingParams) -> bool:
        """Whether the last token is the one that ended the request: it counts, but is no text."""
        ended = self.finish_reason == "stop" and bool(self.token_ids) and not isinstance(self.stop_reason, str)
        return ended and not (params.include_stop and self.token_ids[-1] in params.stop_token_ids)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished request."""

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    """All answers of a beam search, best first; ``token_ids`` are those of the best."""
