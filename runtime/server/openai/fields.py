# SPDX-License-Identifier: Apache-2.0
"""From the fields of a request to the engine's sampling parameters, inside the limits of the model."""

from __future__ import annotations

from phalanx.parallel.errors import RequestError
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.errors import from_request_error, invalid
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.openai.protocol import GenerationRequest

__all__ = ["MAX_CHOICES", "checked_token_ids", "choice_params", "num_choices", "sampling_params"]

MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_CHARACTERS = 1024


def num_choices(request: GenerationRequest) -> int:
    """``n``, checked."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise invalid(f"n={n} is out of range; use 1 to {MAX_CHOICES}", "n")
    return n


def sampling_params(
    request: GenerationRequest,
    model: ModelInfo,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters.

    Raises:
        ApiError: 400, naming the field that is out of range.
    """
    top_k = 0 if request.top_k is None else request.top_k
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=min(top_k, model.vocab_size),
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=0.0 if request.min_p is None else request.min_p,
            seed=request.seed,
            stop=_stop_texts(request.stop),
            stop_token_ids=_stop_token_ids(request.stop_token_ids, model),
            ignore_eos=request.ignore_eos,
            min_tokens=request.min_tokens or 0,
            include_stop=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except RequestError as error:
        raise from_request_error(error) from None


def choice_params(params: SamplingParams, choice: int) -> SamplingParams:
    """Parameters of one of several choices: each draws its own tokens, repeatably where the request has a seed."""
    if params.seed is None or choice == 0:
        return params
    fields = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    return SamplingParams(**{**fields, "seed": _mixed_seed(params.seed, choice)})


def checked_token_ids(token_ids: list[int], model: ModelInfo, name: str) -> tuple[int, ...]:
    """Token ids of a request, each inside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise invalid(f"{name} holds {token_id}; token ids are 0 to {model.vocab_size - 1}", name)
    return tuple(token_ids)


def _stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if len(text) > MAX_STOP_CHARACTERS:
            raise invalid(f"a stop text has {len(text)} characters; use at most {MAX_STOP_CHARACTERS}", "stop")
    return texts


def _stop_token_ids(token_ids: list[int] | None, model: ModelInfo) -> tuple[int, ...]:
    listed = token_ids or []
    if len(listed) > MAX_STOP_TOKEN_IDS:
        raise invalid(f"stop_token_ids has {len(listed)} entries; use at most {MAX_STOP_TOKEN_IDS}", "stop_token_ids")
    return checked_token_ids(listed, model, "stop_token_ids")


def _mixed_seed(seed: int, choice: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014) over seed and choice: well spread, and never by chance the same."""
    mask = 2**64 - 1
    z = (seed + choice * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
