# SPDX-License-Identifier: Apache-2.0
"""From the body of a request to what has to be generated: every check that needs neither the tokenizer nor the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.runtime.sampling.fields import MAX_BEAM_WIDTH
from phalanx.runtime.server.errors import invalid
from phalanx.runtime.server.openai.answer_format import Reply, Served
from phalanx.runtime.server.openai.chat import ChatFormat
from phalanx.runtime.server.openai.chunks import ChunkReply
from phalanx.runtime.server.openai.completions import CompletionFormat
from phalanx.runtime.server.openai.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
    decode_generation,
)
from phalanx.runtime.server.openai.tools import ToolUse, template_call, tool_use

__all__ = [
    "ApiGeneration",
    "Conversation",
    "Generation",
    "Prompt",
    "checked_salt",
    "conversation",
    "parse_chat",
    "parse_completion",
]

DEFAULT_MAX_TOKENS = 16
"""Of a completion; fewer if the context has room for fewer. A chat completion may fill the context."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_SALT_CHARACTERS = 256
MAX_ID_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools, as the checkpoint's template knows them, and how to render them."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    options: dict[str, Any] | None = None
    tools: ToolUse | None = None


Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class Generation:
    """One parsed request.

    Attributes:
        model: name that the request asks for; None = any.
        prompts: in order; each is answered ``n`` times.
        n: answers that the engine gives to each prompt.
        sampling: sampling fields that were given, by the names of `SamplingParams`, less ``max_tokens``.
        max_tokens: as asked for; None = ``default_max_tokens``.
        max_tokens_name: what the request calls it.
        default_max_tokens: None = all that the context has room for.
        add_special_tokens: whether encoding adds them to texts.
        cache_salt: only requests with the same one share what the prefix cache holds.
        priority: lower ones run first, where the server goes by it.
        most_prompt_tokens: how many of each prompt's tokens are kept, the last ones; -1 = as many as the context has room for next to
            ``max_tokens``; None = all.
        bias_words: words, and what is added to the logits of each of their tokens.
        shares_prompt_logprobs: those of a prompt are computed for its first answer, and the others get them at its end; else for each.
    """

    model: str | None
    prompts: Sequence[Prompt]
    n: int
    sampling: dict[str, Any]
    max_tokens: int | None
    max_tokens_name: str
    default_max_tokens: int | None
    add_special_tokens: bool
    cache_salt: str = field(default="", kw_only=True)
    priority: int = field(default=0, kw_only=True)
    most_prompt_tokens: int | None = field(default=None, kw_only=True)
    bias_words: Sequence[tuple[str, float]] = field(default=(), kw_only=True)
    shares_prompt_logprobs: bool = field(default=False, kw_only=True)

    @property
    def num_answers(self) -> int:
        """Engine requests that it becomes."""
        return len(self.prompts) * self.n


@dataclass(frozen=True, slots=True)
class ApiGeneration(Generation):
    """A parsed request of a protocol that says how its answer is written.

    Attributes:
        reply: makes the writer of the answer.
    """

    stream: bool
    reply: Callable[[Served], Reply]


def parse_completion(body: bytes) -> ApiGeneration:
    """``POST /v1/completions``.

    Raises:
        ApiError: 400, naming the field.
    """
    request, sampling = decode_generation(body, CompletionRequest)
    options = _checked(request)
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise invalid(
            "max_tokens=0 without echo or prompt_logprobs asks for nothing; use at least 1, or one of them",
            "max_tokens",
        )
    if request.echo and request.truncate_prompt_tokens is not None:
        raise invalid(
            "echo gives the whole prompt back; leave out truncate_prompt_tokens, or echo", "truncate_prompt_tokens"
        )
    beams = _beams(request, sampling, request.best_of)
    sampling |= beams
    num_candidates = request.n if beams else _num_candidates(request)
    if num_candidates > request.n:
        sampling |= {"logprobs": 0}
    if request.logprobs is not None:
        sampling |= {"logprobs": request.logprobs}
    sampling |= _prompt_logprobs(request, request.logprobs if request.echo else None)
    prompts = _prompts(request)
    return ApiGeneration(
        model=request.model,
        prompts=prompts,
        n=num_candidates,
        sampling=sampling,
        max_tokens=request.max_tokens,
        max_tokens_name="max_tokens",
        default_max_tokens=DEFAULT_MAX_TOKENS,
        add_special_tokens=request.add_special_tokens is not False,
        stream=request.stream,
        reply=lambda served: ChunkReply(CompletionFormat(served, request, prompts, num_candidates), options),
        cache_salt=checked_salt(request.cache_salt),
        priority=request.priority or 0,
        most_prompt_tokens=request.truncate_prompt_tokens,
        shares_prompt_logprobs=not request.stream,
    )


def _prompt_logprobs(request: GenerationRequest, echoed: int | None = None) -> dict[str, int]:
    """The sampling field ``prompt_logprobs``: as many as the request asks for, or as it wants ``echoed``."""
    if request.prompt_logprobs is not None and request.stream:
        raise invalid("prompt_logprobs are part of a whole answer; leave them out, or do not stream", "prompt_logprobs")
    wanted = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    return {"prompt_logprobs": max(wanted)} if wanted else {}


def _beams(request: GenerationRequest, sampling: dict[str, Any], best_of: int | None = None) -> dict[str, Any]:
    """``beam_width``, as ``use_beam_search`` with ``best_of`` or ``n`` means it; a search with one beam is greedy."""
    width = sampling.get("beam_width", (best_of or request.n) if request.use_beam_search else 1)
    if width == 1 and not request.use_beam_search:
        return {}
    if width > MAX_BEAM_WIDTH:
        raise invalid(f"a beam search of width {width} is too wide; use at most {MAX_BEAM_WIDTH}", "n")
    if width < request.n:
        raise invalid(f"n={request.n} is above the width {width} of the beam search; use at most that many", "n")
    if best_of not in (None, width):
        raise invalid(f"best_of={best_of} differs from the width {width} of the beam search; leave it out", "best_of")
    return {"beam_width": width} if width > 1 else {"temperature": 0.0}


def _num_candidates(request: CompletionRequest) -> int:
    """How many answers to a prompt are generated, of which the ``n`` best are returned."""
    best_of = request.n if request.best_of is None else request.best_of
    if best_of < request.n:
        raise invalid(f"best_of={best_of} is below n={request.n}; use at least that many", "best_of")
    if best_of > request.n and request.stream:
        raise invalid("best_of above n needs whole answers to compare; leave it out, or do not stream", "best_of")
    if best_of > request.n and request.max_tokens == 0:
        raise invalid("best_of above n compares generated tokens; leave it out with max_tokens=0", "best_of")
    return best_of


def parse_chat(body: bytes) -> ApiGeneration:
    """``POST /v1/chat/completions``.

    Raises:
        ApiError: 400, naming the field.
    """
    request, sampling = decode_generation(body, ChatRequest)
    options = _checked(request)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    if request.logprobs:
        sampling |= {"logprobs": request.top_logprobs}
    sampling |= _prompt_logprobs(request) | _beams(request, sampling)
    prompt = conversation(request)
    if prompt.tools is not None:
        sampling = prompt.tools.sampling(sampling)
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if asked == 0:
        raise invalid(f"{name}=0 asks for nothing; use at least 1", name)
    return ApiGeneration(
        model=request.model,
        prompts=[prompt],
        n=request.n,
        sampling=sampling,
        max_tokens=asked,
        max_tokens_name=name,
        default_max_tokens=None,
        add_special_tokens=request.add_special_tokens is True,
        stream=request.stream,
        reply=lambda served: ChunkReply(ChatFormat(served, request, prompt.tools), options),
        cache_salt=checked_salt(request.cache_salt),
        priority=request.priority or 0,
        most_prompt_tokens=request.truncate_prompt_tokens,
        shares_prompt_logprobs=not request.stream,
    )


def conversation(request: ChatRequest) -> Conversation:
    """Return the messages and tools of a request, checked.

    Raises:
        ApiError: 400: there are no messages or too many, or a role, a content or a tool is missing.
    """
    if not request.messages:
        raise invalid("messages is empty; give at least one", "messages")
    if len(request.messages) > MAX_MESSAGES:
        raise invalid(f"{len(request.messages)} messages are too many; use at most {MAX_MESSAGES}", "messages")
    for message in request.messages:
        _check_message(message)
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise invalid("continue_final_message needs a last message of the assistant", "continue_final_message")
    return Conversation(
        [_template_message(message) for message in request.messages],
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
        tool_use(request.tools or (), request.tool_choice, request.parallel_tool_calls),
    )


def _check_message(message: ChatMessage) -> None:
    if message.role not in ROLES:
        raise invalid(f"role {message.role!r} is not supported; use one of {', '.join(ROLES)}", "messages")
    if message.content is None and not (message.tool_calls or _thoughts(message)):
        raise invalid("a message has no content; give a string", "messages")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"a message of role {message.role!r} has tool_calls; only the assistant's may", "messages")
    if _thoughts(message) and message.role != "assistant":
        raise invalid(f"a message of role {message.role!r} has reasoning_content; only the assistant's may", "messages")
    if message.reasoning and message.reasoning_content and message.reasoning != message.reasoning_content:
        raise invalid("a message has both reasoning and reasoning_content, which differ; give one of them", "messages")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        raise invalid("tool_call_id belongs to messages of role 'tool', which need one", "messages")


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it; ``developer`` is the newer name of ``system``."""
    role = "system" if message.role == "developer" else message.role
    known: dict[str, Any] = {"role": role, "content": message.content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_calls:
        known["tool_calls"] = [template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    if _thoughts(message):  # the template decides of which turns it shows them
        known["reasoning_content"] = known["reasoning"] = _thoughts(message)
    return known


def _thoughts(message: ChatMessage) -> str | None:
    """What a model wrote before its answer; servers call it ``reasoning_content`` or, later, ``reasoning``."""
    return message.reasoning_content or message.reasoning


def checked_salt(given: str | None) -> str:
    """A request's ``cache_salt``.

    Raises:
        ApiError: 400: it is too long.
    """
    salt = given or ""
    if len(salt) > MAX_SALT_CHARACTERS:
        raise invalid(f"cache_salt has {len(salt)} characters; use at most {MAX_SALT_CHARACTERS}", "cache_salt")
    return salt


def _checked(request: GenerationRequest) -> StreamOptions:
    """The options of a stream, after checks of what completions and chats share."""
    if len(request.request_id or "") > MAX_ID_CHARACTERS:
        raise invalid(f"request_id is longer than {MAX_ID_CHARACTERS} characters; shorten it", "request_id")
    if request.truncate_prompt_tokens == 0:
        raise invalid("truncate_prompt_tokens=0 leaves no prompt; use at least 1, or -1", "truncate_prompt_tokens")
    options = request.stream_options or StreamOptions()
    if not request.stream and options != StreamOptions():
        raise invalid("stream_options needs stream=true; leave it out or stream", "stream_options")
    return options


def _prompts(request: CompletionRequest) -> list[str | tuple[int, ...]]:
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("the prompt is empty; give at least one", "prompt")
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [tuple(item for item in given if isinstance(item, int))]
    if len(kinds) > 1:
        raise invalid("prompt mixes strings and token ids; send them as separate requests", "prompt")
    return [tuple(item) if isinstance(item, list) else item for item in given if not isinstance(item, int)]
