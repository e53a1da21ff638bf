"""What a client asks for and what it gets back, as frozen values; validated when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from phalanx.parallel.errors import RequestError

__all__ = ["FinishReason", "Logprob", "Request", "RequestOutput", "SamplingParams", "TokenDelta"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_LOGPROBS = 20
"""Most alternatives reported per token; bounds the size of a reply."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        max_tokens: most tokens to generate; 0 scores the prompt only.
        temperature: 0 = greedy.
        top_k: keep the k most probable tokens; 0 or -1 = all.
        top_p: then keep the smallest set whose probability reaches p.
        min_p: then drop tokens below ``min_p`` times the largest probability.
        seed: same seed, same tokens, whatever else runs and in any layout; None = drawn by the engine.
        stop: texts that end the generation; left out of the text unless ``include_stop``.
        stop_token_ids: tokens that end it, besides the model's own end tokens.
        ignore_eos: generate past the model's end tokens.
        min_tokens: no end token counts before this many tokens.
        logprobs: alternatives to report per generated token; None = none, 0 = the chosen one only.
        prompt_logprobs: the same for prompt tokens.

    Raises:
        RequestError: a value is outside its range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("max_tokens", self.max_tokens, 0, None)
        _check("temperature", self.temperature, 0.0, 2.0)
        _check("top_k", self.top_k, -1, None)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p=0 keeps no token; use a value in (0, 1], or temperature=0 for greedy", "top_p")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)
        if "" in self.stop:
            raise RequestError("stop holds an empty text, which would stop at once; leave it out", "stop")
        if len(self.stop) > 16:
            raise RequestError(f"stop holds {len(self.stop)} texts; at most 16 are allowed", "stop")


def _check(name: str, value: float, low: float, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r} is not a finite number", name)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name}={value} is out of range; use {limit}", name)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, as the engine sees it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None
    """Monotonic time in seconds after which the request ends with an error; None = never."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the model's own distribution, before temperature and filters.

    ``top`` holds the most probable alternatives, most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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

    def ends_with_stop_token(self, params: SamplingParams) -> bool:
        """Whether the last token is the one that ended the request: it counts, but is no text."""
        ended = self.finish_reason == "stop" and bool(self.token_ids)
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
