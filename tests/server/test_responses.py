"""``/v1/responses`` as the official client sees it. The stub repeats the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from phalanx.runtime.answer import Answer
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.parsing import Conversation
from phalanx.runtime.server.responses.parsing import parse_response

from .servers import Server, stub_server
from .test_tools import END, OSLO, TAUGHT, TEMPLATE, directory

PATH = "/v1/responses"
PROMPT = "[user]hi>"
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
CALL = f'See: <tool_call>{{"name": "weather", "arguments": {OSLO}}}</tool_call>'


def strict_client(server: Server) -> openai.OpenAI:
    """A client that raises where an answer lacks what its types require."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with strict_client(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def tool_server(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = directory(tmp_path_factory.mktemp("hermes"), model_directory, TEMPLATE % TAUGHT["hermes"])
    with stub_server(made, {"model_names": ["stub"]}, max_model_len=2000) as running:
        yield running


@pytest.fixture
def tool_client(tool_server: Server) -> Iterator[openai.OpenAI]:
    with strict_client(tool_server) as opened:
        yield opened


def test_a_text_answers_a_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="stub", input="hi", max_output_tokens=len(PROMPT), temperature=0.5, metadata={"a": "b"}, store=False
    )
    assert response.id.startswith("resp_")
    assert response.output_text == PROMPT
    assert response.output[0].type == "message"
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.temperature, response.metadata, response.error) == (0.5, {"a": "b"}, None)
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(PROMPT), len(PROMPT))


def test_an_answer_that_ends_by_itself_is_completed(client: openai.OpenAI) -> None:
    response = client.responses.create(model="stub", input="hi", extra_body={"stop": "]"})
    assert (response.status, response.output_text, response.incomplete_details) == ("completed", "[user", None)


def test_instructions_and_items_reach_the_template(client: openai.OpenAI) -> None:
    first = client.responses.create(model="stub", input="hi", extra_body={"stop": "]"}).output
    items: list[Any] = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        *[item.to_dict() for item in first],
        {"type": "message", "role": "user", "content": "c"},
    ]
    expected = "[system]s[system]d[user]a[assistant][user[user]c>"
    response = client.responses.create(model="stub", input=items, instructions="s", max_output_tokens=len(expected))
    assert response.output_text == expected


def test_a_stream_has_the_typed_events_in_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="stub", input="hi", stream=True, max_output_tokens=3))
    assert [kind for kind, _ in groupby(event.type for event in events)] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "[us"
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == "[us"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 3


def test_the_stream_helper_adds_events_up(client: openai.OpenAI) -> None:
    with client.responses.stream(model="stub", input="hi", extra_body={"stop": "]"}) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert ("".join(deltas), response.output_text, response.status) == ("[user", "[user", "completed")


def tool_fields(tool_server: Server) -> dict[str, Any]:
    (end,) = tool_server.post("/tokenize", {"prompt": END}).json["tokens"]
    return {"model": "stub", "input": CALL + END, "tools": TOOLS, "extra_body": {"stop_token_ids": [end]}}


def test_a_call_is_an_item(tool_server: Server, tool_client: openai.OpenAI) -> None:
    response = tool_client.responses.create(**tool_fields(tool_server))
    assert response.status == "completed"
    text, call = response.output
    assert response.output_text == "See:"
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("weather", OSLO, "completed")
    assert call.call_id.startswith("call_")
    assert text.type == "message"


def test_a_streamed_call_adds_up_to_the_same(tool_server: Server, tool_client: openai.OpenAI) -> None:
    with tool_client.responses.stream(**tool_fields(tool_server)) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert response.output[1].type == "function_call"
    assert response.output[1].arguments == OSLO
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.arguments, event.output_index) for event in done] == [(OSLO, 1)]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == OSLO


def test_a_call_cut_off_by_a_stop_text_is_incomplete(tool_server: Server, tool_client: openai.OpenAI) -> None:
    fields = tool_fields(tool_server)
    fields["extra_body"] = {**fields["extra_body"], "stop": ["slo"]}
    *_, call = tool_client.responses.create(**fields).output
    *_, last = tool_client.responses.create(**fields, stream=True)
    assert last.type == "response.completed"
    for one in (call, last.response.output[-1]):
        assert one.type == "function_call"
        assert (one.status, one.arguments) == ("incomplete", '{"city": "O')


def test_a_required_call_is_read_from_json(tool_server: Server, tool_client: openai.OpenAI) -> None:
    text = f'[{{"name": "weather", "parameters": {OSLO}}}]'
    fields = tool_fields(tool_server) | {"input": text + END, "tool_choice": "required"}
    (call,) = tool_client.responses.create(**fields).output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", OSLO)
    named = {"input": OSLO + END, "tool_choice": {"type": "function", "name": "weather"}}
    (call,) = tool_client.responses.create(**fields | named).output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", OSLO)


def test_a_format_becomes_a_guide() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for form, guide in (
        ({"type": "json_schema", "name": "x", "schema": schema, "strict": True}, {"json": schema}),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "text"}, None),
    ):
        parsed = parse_response(msgspec.json.encode({"input": "a", "text": {"format": form}}))
        expected = None if guide is None else GuideRule().check("text", guide)
        assert parsed.sampling.get("structured_outputs") == expected


def test_calls_and_their_outputs_reach_the_template(tool_server: Server) -> None:
    items = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "See"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": OSLO, "status": None},
        {"type": "function_call_output", "call_id": "c1", "output": "5"},
        {"role": "user", "content": "show"},
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": OSLO}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "See", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "user", "content": "show"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    count = tool_server.post("/tokenize", {"messages": messages, "tools": tools}).json["count"]
    answer = tool_server.post(PATH, {"input": items, "tools": TOOLS, "max_output_tokens": 1})
    assert answer.json["usage"]["input_tokens"] == count


def test_thoughts_belong_to_the_item_that_follows_them() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}], "encrypted_content": "x",
               "content": [{"type": "reasoning_text", "text": "It "}, {"type": "reasoning_text", "text": "rains."}]}  # fmt: skip
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": OSLO}
    items = [
        {"role": "user", "content": "?"},
        thought,
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "5"},
    ]
    items += [{"type": "reasoning", "id": "rs_2", "summary": []}, {"role": "assistant", "content": "Five."}]
    (prompt,) = parse_response(json.dumps({"input": items}).encode()).prompts
    assert isinstance(prompt, Conversation)
    user, called, output, said = prompt.messages
    assert (called["reasoning_content"], called["reasoning"]) == ("It rains.", "It rains.")
    assert called["tool_calls"]
    assert not any("reasoning" in message for message in (user, output, said))


def test_later_thoughts_of_a_turn_are_added_to_earlier_ones() -> None:
    thoughts = [
        {"type": "reasoning", "id": f"rs_{text}", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
        for text in ("AAA", "BBB")
    ]
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": OSLO}
    items = [
        {"role": "user", "content": "?"},
        thoughts[0],
        {"role": "assistant", "content": "Let me see."},
        thoughts[1],
        call,
    ]
    (prompt,) = parse_response(json.dumps({"input": items}).encode()).prompts
    assert isinstance(prompt, Conversation)
    _, said = prompt.messages
    assert (said["content"], said["reasoning"], said["reasoning_content"]) == ("Let me see.", "AAA\nBBB", "AAA\nBBB")
    assert len(said["tool_calls"]) == 1


def test_an_unknown_kind_of_item_is_named(server: Server) -> None:
    answer = server.post(PATH, {"input": [{"type": "web_search_call", "id": "x"}]})
    assert answer.error["message"] == "input: type 'web_search_call' is not supported by this server; leave it out"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"text": {"format": {"type": "xml"}}}, "text"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "text"),
    ({"text": {"verbosity": "low"}}, "text"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 9999}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [{**TOOLS[0], "strict": True}]}, "tools"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": []}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"type": "image_generation_call", "id": "x", "result": "x"}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"temperature": 3}, "temperature"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, {"model": "stub", "input": "hi", **fields})
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize(
    "fields", [{"reasoning": {"effort": None, "summary": None}}, {"include": []}, {"store": False}]
)
def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert client.responses.create(model="stub", input="ab", max_output_tokens=2, **fields).output_text


@pytest.mark.parametrize(("status", "code"), [(400, "invalid_prompt"), (408, "server_error"), (500, "server_error")])
def test_only_a_refusal_blames_the_prompt_of_a_stream_that_fails(status: int, code: str) -> None:
    events = parse_response(b'{"input": "hi", "stream": true}').reply(Served("stub", None, None)).stream(dict)
    events.opening([Answer(0, (1,), SamplingParams())])
    (line,) = [line for line in events.error(ApiError(status, "why")).splitlines() if line.startswith(b"data: ")]
    assert json.loads(line.removeprefix(b"data: "))["response"]["error"] == {"code": code, "message": "why"}


def test_a_failure_inside_a_stream_is_an_event(model_directory: Path) -> None:
    with stub_server(model_directory, {"model_names": ["stub"]}, fail_after_steps=4, step_seconds=0.1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client:
            *_, last = client.responses.create(model="stub", input="hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "the stub broke" in last.response.error.message
