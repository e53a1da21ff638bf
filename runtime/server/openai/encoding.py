# SPDX-License-Identifier: Apache-2.0
"""From parsed prompts to token ids and the engine's parameters, inside the limits of the model."""

from __future__ import annotations

import dataclasses

from phalanx.parallel.errors import RequestError
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.sampling.fields import LOGIT_BIAS
from phalanx.runtime.sampling.noise import split_mix64
from phalanx.runtime.server.errors import ApiError, from_request_error, invalid
from phalanx.runtime.server.openai.parsing import ApiGeneration, Conversation, Generation, Prompt
from phalanx.runtime.server.services import Services
from phalanx.runtime.text import with_word_tokens, word_biases

__all__ = ["check_prompt_logprobs", "choice_params", "encode", "prompt_token_ids", "render"]

MAX_PROMPT_LOGPROBS = 1 << 20
"""About 70 bytes of JSON each."""
MAX_STREAMED_LOGPROBS = 1 << 16
"""A stream echoes them in one event, which the event loop writes."""


async def encode(services: Services, generation: Generation) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Token ids and parameters of every prompt.

    Raises:
        ApiError: 400: a prompt cannot be read, a token id is outside the vocabulary, or the context is too short.
    """
    if generation.sampling.get("stop"):
        services.need_tokenizer("stop")
    services.check_token_ids(generation.sampling.get("stop_token_ids", ()), "stop_token_ids")
    generation = await _with_biases(services, await _with_guided_calls(services, generation))
    if (guide := generation.sampling.get("structured_outputs")) is not None:
        await services.check_guide(guide)
    encoded, num_scored = [], 0
    for prompt in generation.prompts:
        token_ids = await prompt_token_ids(
            services,
            prompt,
            add_special_tokens=generation.add_special_tokens,
            last=_most_prompt_tokens(services, generation),
        )
        check_prompt_logprobs(generation, num_scored := num_scored + len(token_ids))
        encoded.append((token_ids, await _with_word_tokens(services, _params(services, generation, len(token_ids)))))
    return encoded


def check_prompt_logprobs(generation: Generation, num_tokens: int) -> None:
    """Raise 400 where log-probabilities of prompts of so many tokens would make an answer too large. A chat has them once."""
    if (alternatives := generation.sampling.get("prompt_logprobs")) is None:
        return
    choices = 1 if isinstance(generation.prompts[0], Conversation) else generation.n
    count = num_tokens * (alternatives + 1) * choices
    is_streamed = isinstance(generation, ApiGeneration) and generation.stream
    most, place = (MAX_STREAMED_LOGPROBS, "a stream") if is_streamed else (MAX_PROMPT_LOGPROBS, "an answer")
    if count > most:
        other = ", or do not stream" if is_streamed else ""
        raise invalid(
            f"log-probabilities of {num_tokens} prompt tokens with {alternatives} alternatives in {choices} choices are {count}; at most "
            f"{most} fit into {place}: ask for fewer alternatives or choices, or send shorter prompts{other}",
            "logprobs" if is_streamed else "prompt_logprobs",
        )


def _most_prompt_tokens(services: Services, generation: Generation) -> int | None:
    """How many tokens of a prompt to keep, the last ones; None for all."""
    if generation.most_prompt_tokens != -1:
        return generation.most_prompt_tokens
    return max(1, services.model.max_model_len - max(1, generation.max_tokens or generation.default_max_tokens or 1))


async def render(services: Services, prompt: Conversation) -> str:
    """Return the text of a conversation, as the checkpoint's template writes it.

    Raises:
        ApiError: 400: no template, one that does not know tools, or one that refuses the messages.
    """
    tools = prompt.tools
    template = services.need_template(for_tools=tools is not None)
    if tools is not None and not tools.is_forced and services.tool_call_form is None:
        raise invalid(
            "this server does not know how the model writes tool calls; leave tools out, or start it with --tool-call-parser",
            "tools",
        )
    if not template.shows_tool_calls and any("tool_calls" in message for message in prompt.messages):
        raise invalid("the chat template of this checkpoint does not show tool_calls; leave them out", "messages")
    return await services.in_worker(
        lambda: template.render(
            prompt.messages,
            tools=None if tools is None else tools.described,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            options=prompt.options,
        )
    )


async def _with_guided_calls(services: Services, generation: Generation) -> Generation:
    """The same with the grammar of answers that may be calls, where one is asked for and the form of calls is known; else `render` refuses."""
    tools = next((prompt.tools for prompt in generation.prompts if isinstance(prompt, Conversation)), None)
    form = services.tool_call_form
    if tools is None or form is None:
        return generation
    tokenizer, answer = services.need_tokenizer("tools"), generation.sampling.get("structured_outputs")
    guide = await services.in_worker(lambda: tools.guide(form, tokenizer, answer))
    return dataclasses.replace(generation, sampling={**generation.sampling, **guide})


async def _with_biases(services: Services, generation: Generation) -> Generation:
    """The same with ``logit_bias`` for its `bias_words`."""
    if not (words := generation.bias_words):
        return generation
    tokenizer = services.need_tokenizer("embedding_bias_words")
    biases = await services.in_worker(lambda: word_biases(tokenizer, words))
    try:
        checked = LOGIT_BIAS.check("embedding_bias_words", biases)
    except RequestError as error:
        raise from_request_error(error) from None
    return dataclasses.replace(generation, sampling={**generation.sampling, "logit_bias": checked})


async def _with_word_tokens(services: Services, params: SamplingParams) -> SamplingParams:
    if not params.bad_words:
        return params
    tokenizer = services.need_tokenizer("bad_words")
    return await services.in_worker(lambda: with_word_tokens(params, tokenizer))


def choice_params(params: SamplingParams, choice: int, shares_prompt_logprobs: bool = False) -> SamplingParams:
    """Parameters of one of several choices: each draws its own tokens, repeatably where the request has a seed."""
    if choice == 0 or params.beam_width > 1:
        return params
    if params.seed is not None:
        params = dataclasses.replace(params, seed=split_mix64(params.seed, choice))
    if params.prompt_logprobs is not None and shares_prompt_logprobs:
        params = dataclasses.replace(params, prompt_logprobs=None)
    return params


async def prompt_token_ids(
    services: Services, prompt: Prompt, *, add_special_tokens: bool, last: int | None = None
) -> tuple[int, ...]:
    """Return the token ids of one prompt, of which the ``last`` ones.

    Raises:
        ApiError: 400: it cannot be read, a token id is outside the vocabulary, or its text, or what is wanted of it, cannot fit into the
            context.
    """
    if isinstance(prompt, tuple):
        services.check_token_ids(prompt, "prompt")
        return prompt if last is None else prompt[-last:]
    if isinstance(prompt, str):
        return await services.encode(prompt, add_special_tokens=add_special_tokens, last=last)
    services.check_characters(_num_characters(prompt), "messages", last)
    text = await render(services, prompt)
    return await services.encode(text, add_special_tokens=add_special_tokens, name="messages", last=last)


def _num_characters(prompt: Conversation) -> int:
    """Characters of the messages' texts, which a template writes at least."""
    contents = [message["content"] for message in prompt.messages]
    texts = [content for content in contents if isinstance(content, str)]
    parts = [
        part.get("text")
        for content in contents
        if isinstance(content, list)
        for part in content
        if isinstance(part, dict)
    ]
    return sum(len(text) for text in (*texts, *parts) if isinstance(text, str))


def _params(services: Services, generation: Generation, num_prompt: int) -> SamplingParams:
    if num_prompt == 0:
        raise invalid("the prompt is empty; give at least one token", "prompt")
    max_tokens = _max_tokens(generation, num_prompt, services.model.max_model_len)
    try:
        # A beam search samples nothing, so the checkpoint's defaults for sampling are not for it.
        defaults = services.sampling_defaults if generation.sampling.get("beam_width", 1) == 1 else {}
        return SamplingParams(**{**defaults, **generation.sampling, "max_tokens": max_tokens})
    except RequestError as error:
        raise from_request_error(error) from None


def _max_tokens(generation: Generation, num_prompt: int, limit: int) -> int:
    """How many tokens to generate: what was asked for, or else what the context has room for."""
    room, asked = limit - num_prompt, generation.max_tokens
    if asked is None:
        if room < 1:
            raise context_exceeded(limit, f"{num_prompt}", num_prompt, 0, "prompt")
        return room if generation.default_max_tokens is None else min(room, generation.default_max_tokens)
    if asked > room:
        name = generation.max_tokens_name if room > 0 else "prompt"
        raise context_exceeded(limit, f"{num_prompt + asked}", num_prompt, asked, name)
    return asked


def context_exceeded(limit: int, total: str, num_prompt: int, max_tokens: int, param: str) -> ApiError:
    """The refusal in OpenAI's words, by which clients recognise it and shorten a conversation."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, you requested {total} tokens "
        f"({num_prompt} in the prompt, {max_tokens} for the completion). Please reduce the length of the prompt or completion.",
        param,
        "context_length_exceeded",
    )
