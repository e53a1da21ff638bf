# SPDX-License-Identifier: Apache-2.0
"""Request bodies of the OpenAI protocol, and what of it is refused by name.

Every field that clients of OpenAI and vLLM are known to send is listed, here or in the table of sampling fields. One that
Phalanx cannot honour is accepted only with a value that changes nothing; an unknown field is refused: it is a misspelling
more often than not. In every optional field null means absent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from phalanx.parallel.errors import RequestError
from phalanx.runtime.request import MAX_LOGPROBS
from phalanx.runtime.sampling.fields import SAMPLING_FIELDS, Door, read_fields
from phalanx.runtime.sampling.rules import MAX_INT32, Rule, Whole
from phalanx.runtime.server.errors import ApiError, from_request_error, invalid
from phalanx.runtime.server.openai.guided import with_guide
from phalanx.runtime.server.openai.tools import Tool, ToolCall, ToolChoice
from phalanx.runtime.server.web.json_body import NestingError, decode_json

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "StreamOptions",
    "TokenizeRequest",
    "convert_item",
    "decode_body",
    "decode_generation",
]

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_CHOICES = 128
"""Maximum number of answers to one prompt; the server also limits the requests open at once."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions share, besides the sampling fields. None = the default."""

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    use_beam_search: bool | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    request_id: str | None = None
    return_tokens_as_token_ids: bool = False

    # Other spellings of structured_outputs (see `with_guide`)
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    response_format: dict[str, Any] | None = None

    # Accepted, and without effect on the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    # Known, and accepted only with a value that changes nothing (see `NEUTRAL_VALUES`)
    kv_transfer_params: Any = None
    logits_processors: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    suffix: Any = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    refusal: Any = None


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    echo: bool = False

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    audio: Any = None
    chat_template: Any = None
    documents: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /tokenize``: a text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = True


NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "access_programs": (),
        "allowed_callers": (["direct"],),
        "annotations": ([],),
        "audio": (),
        "background": (False,),
        "background_options": (),
        "chat_template": (),
        "documents": ([],),
        "compaction": (),
        "container": (),
        "conversation": (),
        "context_management": (),
        "defer_loading": (False,),
        "diagnostics": (),
        "fallback_credit_token": (),
        "fallbacks": ([],),
        "function_call": ("none",),
        "functions": ([],),
        "image": (),
        "include": ([], ["reasoning.encrypted_content"]),
        "input_examples": ([],),
        "kv_transfer_params": (),
        "logits_processors": ([],),
        "max_tool_calls": (),
        "mcp_servers": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "output_schema": (),
        "prediction": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "reasoning_effort": ("none",),
        "refusal": ("",),
        "speed": ("standard",),
        "suffix": ("",),
        "thinking": ({"type": "disabled"},),
        "thread": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
"""For each known field without an implementation: values, besides null, that ask for nothing."""

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_UNKNOWN_KIND = re.compile(r"Invalid value '([^']*)' - at `\$\.?(.*?)\.?type`")
_UNKNOWN_VALUE = re.compile(r"Invalid enum value '([^']*)'(?: - at `\$\.?([^`]*)`)?")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`")
_PATH = re.compile(r"`\$\.?(\w*)")


_COUNTS: Mapping[str, Rule] = MappingProxyType(
    {
        "n": Whole(1, MAX_CHOICES),
        "best_of": Whole(1, MAX_CHOICES),
        "max_tokens": Whole(0, MAX_INT32),
        "max_completion_tokens": Whole(1, MAX_INT32),
        "max_output_tokens": Whole(1, MAX_INT32),
        "top_logprobs": Whole(0, MAX_LOGPROBS),
        "prompt_logprobs": Whole(0, MAX_LOGPROBS),
        "priority": Whole(-MAX_INT32, MAX_INT32),
        "truncate_prompt_tokens": Whole(-1, MAX_INT32),
    }
)
"""Whole numbers of the protocol that are not sampling fields."""


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """Read a request body without sampling fields.

    Raises:
        ApiError: 400, naming the field: no JSON, a wrong type, an unknown field, or one that cannot be honoured.
    """
    return _to_struct(_decode_object(body), kind)


def decode_generation(body: bytes, kind: type[Body], door: Door = "openai") -> tuple[Body, dict[str, Any]]:
    """Read a request body and, separately, its sampling fields, which have ``door``'s names, checked and by their own names.

    Raises:
        ApiError: as `decode_body`; a sampling field has the wrong type or is out of range.
    """
    fields = _decode_object(body)
    counts = dict(_COUNTS) if kind is not CompletionRequest else {**_COUNTS, "logprobs": Whole(0, MAX_LOGPROBS)}
    try:
        fields = with_guide(fields) if door == "openai" else fields
        sampling = read_fields(fields, door)
        fields |= {
            name: rule.check(name, fields[name]) for name, rule in counts.items() if fields.get(name) is not None
        }
    except RequestError as error:
        raise from_request_error(error, "invalid_value") from None
    rest = {name: value for name, value in fields.items() if name not in sampling_names(door)}
    return _to_struct(rest, kind), sampling


def convert_item(fields: dict[str, Any], kind: Any, param: str) -> Any:
    """Return one of several values in the field ``param`` as ``kind``, a struct or a union of them; null means absent.

    Raises:
        ApiError: 400, naming ``param``: a wrong type, or an unknown or a missing field.
    """
    try:
        return msgspec.convert(_without_null(fields), type=kind)
    except msgspec.ValidationError as error:
        refused = _refused_field(str(error))
        raise invalid(f"{param}: {refused}", param, refused.code) from None


@functools.cache
def sampling_names(door: Door) -> frozenset[str]:
    """What a protocol calls the sampling fields."""
    return frozenset(field.doors[door] for field in SAMPLING_FIELDS if door in field.doors)


def _decode_object(body: bytes) -> dict[str, Any]:
    if not body:
        raise invalid("the body is empty; send a JSON object", code="invalid_json")
    try:
        fields = decode_json(body)
    except NestingError as error:
        raise invalid(f"the body cannot be read: {error}", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid("the body is not a JSON object; send one", code="invalid_type")
    return fields


def _to_struct(fields: dict[str, Any], kind: type[Body]) -> Body:
    given = _without_null(fields)
    for name in ("messages", "reasoning", "stream_options", "tools"):
        if name in given:
            given[name] = _without_null_inside(given[name])
    try:
        request = msgspec.convert(given, type=kind)
    except msgspec.ValidationError as error:
        raise _refused_field(str(error)) from None
    _refuse_unsupported(request)
    for name in ("messages", "tools"):
        for item in getattr(request, name, None) or ():
            _refuse_unsupported(item)
    return request


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _without_null_inside(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null(item) if isinstance(item, dict) else item for item in value]
    return _without_null(value) if isinstance(value, dict) else value


def _refused_field(reason: str) -> ApiError:
    if match := _UNKNOWN_FIELD.search(reason):
        return invalid(f"unknown field {match[1]!r}; check its spelling", match[1], "unknown_parameter")
    if match := _MISSING_FIELD.search(reason):
        return invalid(f"{reason}; give it", match[1], "missing_required_parameter")
    if match := _UNKNOWN_KIND.search(reason):
        place = f" of {match[2]}" if match[2] else ""
        return invalid(
            f"type {match[1]!r:.60}{place} is not supported by this server; leave it out",
            re.split(r"\W", match[2])[0] or "type",
            "unsupported_parameter",
        )
    if match := _UNKNOWN_VALUE.search(reason):
        place = match[2] or "value"
        return invalid(
            f"{place}={match[1]!r:.60} is not supported by this server; use another, or leave it out",
            re.split(r"\W", place)[0] if match[2] else None,
            "invalid_value",
        )
    match = _PATH.search(reason)
    return invalid(reason, match[1] or None if match else None, "invalid_type")


def _refuse_unsupported(struct: msgspec.Struct) -> None:
    for name in unsupported_fields(type(struct)):
        value = getattr(struct, name)
        if value is not None and value not in NEUTRAL_VALUES[name]:
            raise invalid(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")


@functools.cache
def unsupported_fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Fields of ``kind`` without an implementation: typed `Any` and listed in `NEUTRAL_VALUES`."""
    fields = msgspec.structs.fields(kind)
    return tuple(field.encode_name for field in fields if field.type is Any and field.name in NEUTRAL_VALUES)
