"""Request fields: every one is honoured or refused, and becomes the right sampling parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
import pytest

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.sampling.fields import SAMPLING_FIELDS, device_values
from phalanx.runtime.server.anthropic.protocol import MessagesRequest
from phalanx.runtime.server.anthropic.protocol import Tool as AnthropicTool
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai import encoding
from phalanx.runtime.server.openai.encoding import choice_params
from phalanx.runtime.server.openai.parsing import Conversation, Generation, parse_chat, parse_completion
from phalanx.runtime.server.openai.protocol import (
    NEUTRAL_VALUES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    decode_body,
    decode_generation,
    unsupported_fields,
)
from phalanx.runtime.server.responses.protocol import ResponsesRequest, ResponsesTool

WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "billing_policy",
    "cache_control",
    "inference_geo",
    "prompt_cache_options",
    "user_profile_id",
    "workspace_id",
    "content",
}


REQUIRED: dict[type[msgspec.Struct], dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    ChatRequest: {"messages": []},
    ChatMessage: {"role": "user"},
    MessagesRequest: {"messages": [], "max_tokens": 1},
    ResponsesRequest: {"input": "a"},
    AnthropicTool: {"name": "f", "input_schema": {}},
    ResponsesTool: {"name": "f"},
}
"""Every body, and part of one, with fields that are known and not honoured, and the fields that it must have."""


@pytest.mark.parametrize("kind", REQUIRED)
def test_every_untyped_field_is_refused_or_known_to_have_no_effect(kind: type[msgspec.Struct]) -> None:
    untyped = {name for name, annotation in get_type_hints(kind).items() if annotation is Any}
    assert untyped - set(unsupported_fields(kind)) <= WITHOUT_EFFECT


def test_no_entry_of_the_table_is_without_a_field() -> None:
    listed = {name for kind in REQUIRED for name in unsupported_fields(kind)}
    assert listed == set(NEUTRAL_VALUES)


@pytest.mark.parametrize("kind", [MessagesRequest, ResponsesRequest])
def test_fields_of_tools_are_refused_by_name(kind: type[msgspec.Struct]) -> None:
    tool = {**REQUIRED[AnthropicTool if kind is MessagesRequest else ResponsesTool], "defer_loading": True}
    with pytest.raises(ApiError, match="defer_loading is not supported by this server; leave it out"):
        decode_body(msgspec.json.encode({**REQUIRED[kind], "tools": [tool]}), kind)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ResponsesRequest, {"text": {"verbosity": "low"}}, "text.verbosity='low'"),
        (MessagesRequest, {"messages": [{"role": "system", "content": "a"}]}, "messages[0].role='system'"),
        (ChatRequest, {"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type='custom'"),
    ],
)
def test_values_that_are_none_of_a_field_are_named_with_their_place(
    kind: type[msgspec.Struct], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        decode_body(msgspec.json.encode({**REQUIRED[kind], **fields}), kind)
    assert str(caught.value) == f"{message} is not supported by this server; use another, or leave it out"
    assert (caught.value.param, caught.value.code) == (next(iter(fields)), "invalid_value")


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_neutral_values_pass_and_others_are_refused_by_name(name: str) -> None:
    for kind, required in REQUIRED.items():
        if name not in unsupported_fields(kind):
            continue
        for value in (None, *NEUTRAL_VALUES[name]):
            decode_body(msgspec.json.encode({**required, name: value}), kind)
        with pytest.raises(ApiError) as caught:
            decode_body(msgspec.json.encode({**required, name: {"some": "thing"}}), kind)
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")


def generation(**fields: Any) -> Generation:
    return parse_completion(msgspec.json.encode({"prompt": "a", **fields}))


def chat(**fields: Any) -> Generation:
    return parse_chat(msgspec.json.encode({"messages": [{"role": "user", "content": "a"}], **fields}))


def refusal(parse: Callable[..., Generation], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


def test_fields_become_sampling_fields_by_their_own_names() -> None:
    parsed = generation(
        temperature=0.5, top_k=1000, top_p=0.9, min_p=0.1, seed=7, stop="x", stop_token_ids=[5], ignore_eos=True, min_tokens=2,
        include_stop_str_in_output=True, skip_special_tokens=False, logprobs=3, echo=True, max_tokens=9,
        logit_bias={"7": -1.5}, repetition_penalty=1.2, presence_penalty=-2, frequency_penalty=0.5,
    )  # fmt: skip
    assert SamplingParams(**parsed.sampling, max_tokens=9) == SamplingParams(
        max_tokens=9, temperature=0.5, top_k=1000, top_p=0.9, min_p=0.1, seed=7, stop=("x",), stop_token_ids=(5,), ignore_eos=True,
        min_tokens=2, include_stop=True, skip_special_tokens=False, logprobs=3, prompt_logprobs=3, logit_bias=((7, -1.5),),
        repetition_penalty=1.2, presence_penalty=-2.0, frequency_penalty=0.5,
    )  # fmt: skip
    assert parsed.max_tokens == 9


OPENAI_NAMES = [field.doors["openai"] for field in SAMPLING_FIELDS if "openai" in field.doors]
COMMON = [
    *OPENAI_NAMES,
    "model",
    "max_tokens",
    "n",
    "add_special_tokens",
    "return_token_ids",
    "stream",
    "stream_options",
]


@pytest.mark.parametrize("name", [*COMMON, "echo", "logprobs", "best_of", "suffix", "user"])
def test_null_is_absent_in_every_field_of_a_completion(name: str) -> None:
    assert same(generation(**{name: None}), generation())


@pytest.mark.parametrize(
    "name", [*COMMON, "add_generation_prompt", "continue_final_message", "logprobs", "top_logprobs", "max_completion_tokens", "tools",
             "chat_template_kwargs", "response_format"],
)  # fmt: skip
def test_null_is_absent_in_every_field_of_a_chat(name: str) -> None:
    assert same(chat(**{name: None}), chat())


def same(one: Generation, other: Generation) -> bool:
    """Whether two requests ask for the same; the writers of their answers are made anew."""
    return dataclasses.replace(one, reply=other.reply) == other


@pytest.mark.parametrize("name", ["include_usage", "continuous_usage_stats", "include_obfuscation"])
def test_null_is_absent_inside_stream_options(name: str) -> None:
    body = {"prompt": "a", "stream": True, "stream_options": {name: None}}
    assert decode_generation(msgspec.json.encode(body), CompletionRequest)[0].stream_options == StreamOptions()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_of_earlier_turns_reach_the_template(name: str) -> None:
    turn = {"role": "assistant", "content": "4", name: "2 + 2"}
    conversation = chat(messages=[turn, {"role": "user", "content": "a"}]).prompts[0]
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0] == {
        "role": "assistant", "content": "4", "reasoning": "2 + 2", "reasoning_content": "2 + 2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "turn", [{"role": "user", "reasoning_content": "x"}, {"role": "assistant", "reasoning": "x", "reasoning_content": "y"},
             {"role": "assistant", "reasoning_content": ["x"]}],
)  # fmt: skip
def test_thoughts_that_cannot_be_shown_are_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r"reasoning_content|Expected `str"):
        chat(messages=[{"content": "a", **turn}])


def test_null_is_absent_inside_messages_as_clients_replay_them() -> None:
    replayed = {"role": "assistant", "content": "Hello", "refusal": None, "annotations": None, "audio": None, "function_call": None,
                "tool_calls": None, "name": None, "reasoning_content": None}  # fmt: skip
    parsed = chat(messages=[replayed, {"role": "user", "content": "a"}])
    assert isinstance(parsed.prompts[0], Conversation)
    assert parsed.prompts[0].messages[0] == {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "fields", [{"logprobs": False, "top_logprobs": 0}, {"top_p": 0}, {"top_p": 0.0, "temperature": 0}, {"stop": []}, {"stop_token_ids": []},
               {"top_k": 0}, {"top_k": -1}, {"min_p": 0}, {"min_tokens": 0}, {"stream": False}, {"n": 1}, {"n": 1.0}, {"seed": 0},
               {"stream_options": {}}, {"stream_options": {"include_usage": False}}],
)  # fmt: skip
def test_neutral_values_ask_for_nothing(fields: dict[str, Any]) -> None:
    SamplingParams(**chat(**fields).sampling)
    if "top_logprobs" not in fields:
        SamplingParams(**generation(**fields).sampling)


WRONG: list[Any] = [{"a": 1}, [{"a": 1}], 2000.5, -(10**30), "x" * 2000]


@pytest.mark.parametrize("name", [*OPENAI_NAMES, "max_tokens", "n", "best_of", "logprobs", "echo", "stream"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_a_value_of_another_type_is_refused_under_the_protocols_name(name: str, value: Any) -> None:
    if name == "stop" and isinstance(value, str):
        assert "2000 characters" in str(refusal(generation, stop=value))
        return
    error = refusal(generation, **{name: value})
    assert error.param == name
    assert name in str(error)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"5", b"null", b'"x"', b"{", b'{"prompt": NaN}', b'{"temperature": 1e999}', b"\xff"]
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("value", [1e-38, 1e-45, 1e-30, 1e-9])
def test_a_temperature_next_to_zero_is_greedy(value: float) -> None:
    params = SamplingParams(**generation(temperature=value).sampling)
    assert device_values(params, 100)[0] == 0.0


def test_max_tokens_that_nobody_sent_does_not_refuse_a_prompt_near_the_limit() -> None:
    assert encoding._max_tokens(generation(), 100, 104) == 4
    assert encoding._max_tokens(generation(), 10, 104) == 16
    assert encoding._max_tokens(chat(), 10, 104) == 94
    assert encoding._max_tokens(generation(max_tokens=4), 100, 104) == 4


@pytest.mark.parametrize(("fields", "num_prompt", "param"), [({"max_tokens": 5}, 100, "max_tokens"), ({}, 104, "prompt"),
                                                             ({"max_tokens": 5}, 105, "prompt"), ({}, 10**7, "prompt")])  # fmt: skip
def test_a_full_context_is_refused_in_openais_words(fields: dict[str, Any], num_prompt: int, param: str) -> None:
    with pytest.raises(ApiError, match="maximum context length is 104 tokens") as caught:
        encoding._max_tokens(generation(**fields), num_prompt, 104)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_choices_of_a_seeded_request_draw_differently_and_repeatably() -> None:
    params = SamplingParams(seed=-3)
    seeds = [choice_params(params, number).seed for number in range(50)]
    assert seeds[0] == -3
    assert len(set(seeds)) == 50
    assert seeds == [choice_params(params, number).seed for number in range(50)]
    assert seeds[1:] != [choice_params(SamplingParams(seed=-2), number).seed for number in range(1, 50)]


def test_choices_without_a_seed_stay_without() -> None:
    assert choice_params(SamplingParams(), 3).seed is None
