"""Request fields: every one is honoured or refused, and becomes the right sampling parameter."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.openai.fields import choice_params, sampling_params
from phalanx.runtime.server.openai.protocol import (
    NEUTRAL_VALUES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    decode_body,
    unsupported_fields,
)

MODEL = ModelInfo("/model", vocab_size=100, max_model_len=64, max_open_requests=8)
WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "parallel_tool_calls",
    "content",
}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, ChatMessage])
def test_every_untyped_field_is_refused_or_known_to_have_no_effect(kind: type[msgspec.Struct]) -> None:
    untyped = {name for name, annotation in get_type_hints(kind).items() if annotation is Any}
    assert untyped - set(unsupported_fields(kind)) <= WITHOUT_EFFECT


def test_no_entry_of_the_table_is_without_a_field() -> None:
    listed = {name for kind in (CompletionRequest, ChatRequest, ChatMessage) for name in unsupported_fields(kind)}
    assert listed == set(NEUTRAL_VALUES)


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_neutral_values_pass_and_others_are_refused_by_name(name: str) -> None:
    kind = next(kind for kind in (CompletionRequest, ChatRequest, ChatMessage) if name in unsupported_fields(kind))
    fixed: dict[type[msgspec.Struct], dict[str, Any]] = {
        CompletionRequest: {"prompt": "a"},
        ChatRequest: {"messages": []},
        ChatMessage: {"role": "user"},
    }
    for value in (None, *NEUTRAL_VALUES[name]):
        decode_body(msgspec.json.encode({**fixed[kind], name: value}), kind)
    with pytest.raises(ApiError) as caught:
        decode_body(msgspec.json.encode({**fixed[kind], name: {"some": "thing"}}), kind)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")


def test_fields_become_sampling_parameters() -> None:
    request = CompletionRequest(
        prompt="a",
        temperature=0.5,
        top_k=1000,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        stop="x",
        stop_token_ids=[5],
        ignore_eos=True,
        min_tokens=2,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    assert sampling_params(request, MODEL, max_tokens=9, logprobs=3, prompt_logprobs=1) == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=100,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        stop=("x",),
        stop_token_ids=(5,),
        ignore_eos=True,
        min_tokens=2,
        include_stop=True,
        skip_special_tokens=False,
        logprobs=3,
        prompt_logprobs=1,
    )


def test_choices_of_a_seeded_request_draw_differently_and_repeatably() -> None:
    params = SamplingParams(seed=-3)
    seeds = [choice_params(params, number).seed for number in range(50)]
    assert seeds[0] == -3
    assert len(set(seeds)) == 50
    assert seeds == [choice_params(params, number).seed for number in range(50)]
    assert seeds[1:] != [choice_params(SamplingParams(seed=-2), number).seed for number in range(1, 50)]


def test_choices_without_a_seed_stay_without() -> None:
    assert choice_params(SamplingParams(), 3).seed is None
