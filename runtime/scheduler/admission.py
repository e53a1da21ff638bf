# SPDX-License-Identifier: Apache-2.0
"""Validate a request at submission; build its admission record."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from phalanx.parallel.errors import RequestError
from phalanx.runtime.kv_cache import CachePlanner
from phalanx.runtime.request import Request
from phalanx.runtime.sampling.biases import token_biases
from phalanx.runtime.sampling.fields import DEVICE_COLUMNS, MAX_ALTERNATIVES, SamplingParams, device_values
from phalanx.runtime.sampling.masks import AllowedTokens, GuideMasks, TokenMask
from phalanx.runtime.sampling.noise import split_mix64
from phalanx.runtime.scheduler.beam_search import num_candidates
from phalanx.runtime.scheduler.sequences import Int32Array, Sequence
from phalanx.runtime.scheduler.values import SchedulerConfig

__all__ = ["admission_row", "bias_rows", "make_mask", "make_sequence", "num_alternatives"]

_COLUMNS = tuple(name for name, _ in DEVICE_COLUMNS)


def make_sequence(request: Request, number: int, config: SchedulerConfig, cache: CachePlanner) -> Sequence:
    """Check a request and give it its seed.

    Raises:
        RequestError: it could never run with these limits.
    """
    params = request.params
    if params.bad_words:
        raise RequestError(
            "bad_words are texts, which the checkpoint has no tokenizer.json for; use bad_token_ids", "bad_words"
        )
    if request.priority and config.policy != "priority":
        raise RequestError(
            f"priority={request.priority} counts on servers with --scheduling-policy priority only, which this one is not; "
            "use 0, or leave it out",
            "priority",
        )
    token_ids = _prompt_array(request, config.vocab_size)
    _check_length(len(token_ids), params.max_tokens, config, cache)
    end_token_ids = _end_token_ids(request, config)
    _check_allowed(params, end_token_ids)
    is_beam = params.beam_width > 1
    if is_beam:
        _check_beams(params, len(token_ids), end_token_ids, config, cache)
    return Sequence(
        number,
        request,
        token_ids,
        seed=split_mix64(config.seed, number + 1) if params.seed is None else params.seed % 2**64,
        end_token_ids=end_token_ids,
        biases=[] if is_beam else token_biases(params, len(token_ids), end_token_ids),
        prompt_logprobs=None if params.prompt_logprobs is None else [None],
        is_beam=is_beam,
        num_prefix=_prefix_length(request.prompt_token_ids, config) if config.prefix_end else 0,
    )


def make_mask(params: SamplingParams, config: SchedulerConfig, guides: GuideMasks | None) -> TokenMask | None:
    """Which tokens a new sequence may choose; None = any, or it chooses none.

    Raises:
        RequestError: it has a guide, and there is nothing that compiles them.
    """
    if params.structured_outputs is not None:
        if guides is None:
            raise RequestError("structured_outputs is not supported by this engine; leave it out", "structured_outputs")
        if not config.eos_token_ids:
            raise RequestError(
                "structured_outputs needs an end token, but the checkpoint names none; leave it out",
                "structured_outputs",
            )
    if params.max_tokens == 0:
        return None
    if params.structured_outputs is not None and guides is not None:
        return guides.start(params.structured_outputs)
    if params.allowed_token_ids is None:
        return None
    return AllowedTokens(params.allowed_token_ids, config.vocab_size)


def num_alternatives(sequence: Sequence, vocab_size: int) -> int:
    """Most probable tokens that executors report for each row of a sequence."""
    params = sequence.request.params
    wanted = num_candidates(params, sequence.end_token_ids) if sequence.is_beam else 0
    return min(max(wanted, params.logprobs or 0), vocab_size)


def admission_row(sequence: Sequence, seq_index: int, vocab_size: int) -> tuple[Any, ...]:
    """The `ADMISSION` of a sequence; the same whenever it is admitted again."""
    values = device_values(sequence.request.params, vocab_size)
    row = (seq_index, *values, sequence.num_prompt, sequence.num_prefix, len(sequence.biases), sequence.seed)
    if sequence.is_beam:  # the scheduler chooses: executors find candidates, and need not sample
        beams = {"temperature": 0.0, "num_logprobs": num_alternatives(sequence, vocab_size)}
        row = tuple(beams.get(name, value) for name, value in zip(_COLUMNS, row, strict=True))
    return row


def bias_rows(sequence: Sequence, seq_index: int) -> list[tuple[Any, ...]]:
    """The `TOKEN_BIAS_ENTRY` rows of a sequence; the same whenever it is admitted again."""
    return [(seq_index, index, bias) for index, bias in enumerate(sequence.biases)]


def _prompt_array(request: Request, vocab_size: int) -> Int32Array:
    if not request.prompt_token_ids:
        raise RequestError("the prompt has no tokens; give at least one", "prompt")
    token_ids = np.array(request.prompt_token_ids)
    if token_ids.dtype.kind not in "iu" or token_ids.ndim != 1:
        raise RequestError("prompt token ids must be whole numbers that fit in 64 bits", "prompt")
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if outside.any():
        index = int(outside.argmax())
        raise RequestError(
            f"prompt token {index} is {token_ids[index]}; ids of this model go from 0 to {vocab_size - 1}",
            "prompt",
        )
    return token_ids.astype(np.int32)


def _prefix_length(token_ids: tuple[int, ...], config: SchedulerConfig) -> int:
    """Tokens before the last of the model's `prefix_end`."""
    ends = ", ".join(map(str, config.prefix_end))
    if not all(token in token_ids for token in config.prefix_end):
        raise RequestError(f"the prompt lacks the tokens {ends}, after which this model answers; add them", "prompt")
    first, *others = (token_ids.index(token) for token in config.prefix_end)
    if others != list(range(first + 1, first + 1 + len(others))):
        raise RequestError(
            f"the prompt has the tokens {ends}, after which this model answers, apart or more than once; use them once",
            "prompt",
        )
    length, limit = first + len(others), config.longest_prefix
    if length > limit:
        raise RequestError(
            f"the prompt has {length} tokens before its answer, which this model computes in one step of at most {limit}; "
            "shorten the prompt (operator: --max-num-batched-tokens)",
            "prompt",
            "context_length_exceeded",
        )
    return length


def _check_length(num_prompt: int, max_tokens: int, config: SchedulerConfig, cache: CachePlanner) -> None:
    limit, owner, flags = config.max_model_len, "max_model_len", "--max-model-len"
    if cache.max_tokens_per_seq < limit:
        limit, owner, flags = (
            cache.max_tokens_per_seq,
            "the key/value cache's room",
            "a larger --num-kv-blocks",
        )
    if num_prompt + max_tokens <= limit:
        return
    asked = f"a prompt of {num_prompt} tokens and max_tokens={max_tokens}"
    if num_prompt > limit:
        way_out, param = "shorten the prompt", "prompt"
    else:
        way_out, param = f"use max_tokens up to {limit - num_prompt} or a shorter prompt", "max_tokens"
    raise RequestError(
        f"{asked} exceed {owner} of {limit} tokens; {way_out} (operator: {flags})", param, "context_length_exceeded"
    )


def _check_beams(
    params: SamplingParams,
    num_prompt: int,
    end_token_ids: tuple[int, ...],
    config: SchedulerConfig,
    cache: CachePlanner,
) -> None:
    width = params.beam_width
    blocks = width * -(-(num_prompt + params.max_tokens) // cache.block_size)
    candidates = num_candidates(params, end_token_ids)
    for needed, limit, what in (
        (width, config.max_num_seqs, "sequences at once (operator: --max-num-seqs)"),
        (blocks, cache.num_blocks, "cache blocks (operator: --num-kv-blocks)"),
        (candidates, MAX_ALTERNATIVES, "candidates a step; use fewer stop_token_ids and stop_token_sequences"),
    ):
        if needed > limit:
            raise RequestError(
                f"beam_width={width} needs {needed} of {limit} {what}; use a smaller beam_width", "beam_width"
            )


def _end_token_ids(request: Request, config: SchedulerConfig) -> tuple[int, ...]:
    own = request.params.stop_token_ids
    ignored = request.params.ignore_eos and request.params.structured_outputs is None
    models = () if ignored else config.eos_token_ids
    _check_vocabulary("stop_token_ids", own, config.vocab_size)
    for name in ("bad_token_ids", "stop_token_sequences"):
        _check_vocabulary(name, itertools.chain.from_iterable(getattr(request.params, name)), config.vocab_size)
    _check_vocabulary("allowed_token_ids", request.params.allowed_token_ids or (), config.vocab_size)
    _check_vocabulary("logit_bias", [token for token, _ in request.params.logit_bias], config.vocab_size)
    return (*models, *own)


def _check_allowed(params: SamplingParams, end_token_ids: tuple[int, ...]) -> None:
    """Refuse allowed tokens that are all banned, as any token might come then."""
    if params.allowed_token_ids is None:
        return
    banned = {word[0] for word in params.bad_token_ids if len(word) == 1}
    banned |= set(end_token_ids) if params.min_tokens else set()
    if banned.issuperset(params.allowed_token_ids):
        raise RequestError(
            "allowed_token_ids holds nothing but bad words and, before min_tokens, end tokens; allow another token",
            "allowed_token_ids",
        )


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name} holds {token}; ids of this model go from 0 to {vocab_size - 1}", name)
