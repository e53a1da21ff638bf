"""Anthropic's official client, unmodified: messages, streams, tools, token counts, errors. The stub repeats the prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import anthropic
import pytest

from phalanx.runtime.server.anthropic.parsing import parse_message
from phalanx.runtime.server.openai.parsing import Conversation

from .servers import Server, stub_server
from .test_tools import END, OSLO, TAUGHT, TEMPLATE, directory

PATH = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "hi"}]
PROMPT = "[user]hi>"
TOOLS: list[Any] = [{"name": "weather", "description": "Now", "input_schema": {"type": "object", "properties": {}}}]
CALL = f'See: <tool_call>{{"name": "weather", "arguments": {OSLO}}}</tool_call>'


def strict_client(server: Server) -> anthropic.Anthropic:
    """A client that raises where an answer lacks what its types require."""
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with strict_client(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def tool_server(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = directory(tmp_path_factory.mktemp("hermes"), model_directory, TEMPLATE % TAUGHT["hermes"])
    with stub_server(made, {"model_names": ["stub"]}, max_model_len=2000) as running:
        yield running


@pytest.fixture
def tool_client(tool_server: Server) -> Iterator[anthropic.Anthropic]:
    with strict_client(tool_server) as opened:
        yield opened


def test_a_message(client: anthropic.Anthropic) -> None:
    sampling = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    message = client.messages.create(model="stub", max_tokens=len(PROMPT), messages=HI, extra_body=sampling)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "stub")
    assert [(block.type, block.text) for block in message.content if block.type == "text"] == [("text", PROMPT)]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (len(PROMPT) - 4, 4, len(PROMPT))


def test_system_and_blocks_reach_the_template(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b", "citations": None}]},
        {"role": "user", "content": "c"},
    ]
    expected = "[system]s[user]a[assistant]b[user]c>"
    for system in ("s", [{"type": "text", "text": "s"}]):
        message = client.messages.create(model="stub", max_tokens=len(expected), messages=messages, system=system)
        assert message.content[0].type == "text"
        assert message.content[0].text == expected


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="stub", max_tokens=50, messages=HI, stop_sequences=["zzz", "]h"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "]h")
    assert message.content[0].type == "text"
    assert message.content[0].text == "[user"


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [*HI, {"role": "assistant", "content": "yes"}]
    message = client.messages.create(model="stub", max_tokens=30, messages=messages)
    assert message.content[0].type == "text"
    assert message.content[0].text.startswith("[user]hi[assistant]yes[user]")


def test_a_stream_has_the_events_of_the_protocol_in_order(client: anthropic.Anthropic) -> None:
    stream = client.messages.create(model="stub", max_tokens=3, messages=HI, stream=True)
    events = [event.to_dict() for event in stream]
    assert [kind for kind, _ in groupby(event["type"] for event in events)] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []  # type: ignore[index]
    assert events[1]["content_block"]["text"] == ""  # type: ignore[index]
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == "[us"  # type: ignore[index]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"  # type: ignore[index]
    assert events[-2]["usage"]["output_tokens"] == 3  # type: ignore[index]


def test_the_stream_helper_adds_events_up(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="stub", max_tokens=50, messages=HI, stop_sequences=["]"]) as stream:
        assert "".join(stream.text_stream) == "[user"
        message = stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "]")
    assert message.usage.cache_read_input_tokens == 4


def test_an_asynchronous_client(server: Server) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=9) as client,
            client.messages.stream(model="stub", max_tokens=len(PROMPT), messages=HI) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == PROMPT


def test_count_tokens(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="stub", messages=HI).input_tokens == len(PROMPT)
    assert client.messages.count_tokens(model="stub", messages=HI, system="s").input_tokens == len("[system]s" + PROMPT)


def ask_for_call(tool_server: Server, text: str) -> dict[str, Any]:
    (end,) = tool_server.post("/tokenize", {"prompt": END}).json["tokens"]
    # The protocol has no stop tokens: the end of the answer is the token limit, one before the prompt repeats.
    tokens = tool_server.post("/tokenize", {"prompt": text}).json["tokens"]
    assert end not in tokens
    return {"model": "stub", "messages": [{"role": "user", "content": text}], "tools": TOOLS, "max_tokens": len(tokens)}


def test_a_call_becomes_a_tool_use_block(tool_server: Server, tool_client: anthropic.Anthropic) -> None:
    message = tool_client.messages.create(**ask_for_call(tool_server, CALL + "#"), stop_sequences=["#"])
    text, call = message.content
    assert text.type == "text"
    assert text.text == "See:"
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", json.loads(OSLO))
    assert message.stop_reason == "tool_use"


def test_a_streamed_call_adds_up_to_the_same(tool_server: Server, tool_client: anthropic.Anthropic) -> None:
    with tool_client.messages.stream(**ask_for_call(tool_server, CALL + "#"), stop_sequences=["#"]) as stream:
        starts = [event for event in stream if event.type == "content_block_start"]
        message = stream.get_final_message()
    assert [(event.index, event.content_block.type) for event in starts] == [(0, "text"), (1, "tool_use")]
    assert message.content[1].type == "tool_use"
    assert message.content[1].input == json.loads(OSLO)
    assert message.stop_reason == "tool_use"


def test_a_call_cut_off_by_the_limit_is_no_call(tool_server: Server, tool_client: anthropic.Anthropic) -> None:
    fields = ask_for_call(tool_server, CALL) | {"max_tokens": CALL.index("Oslo") + 2}
    message = tool_client.messages.create(**fields)
    assert [block.type for block in message.content] == ["text", "text"]
    assert message.stop_reason == "max_tokens"


def test_a_call_cut_off_by_a_stop_sequence_is_no_call(tool_server: Server, tool_client: anthropic.Anthropic) -> None:
    fields = ask_for_call(tool_server, CALL) | {"stop_sequences": ["slo"]}
    message = tool_client.messages.create(**fields)
    assert [block.type for block in message.content] == ["text", "text"]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "slo")
    with tool_client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", "slo")


def test_results_of_tools_are_messages_of_their_own(tool_server: Server, tool_client: anthropic.Anthropic) -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "5"}]}
    messages: list[Any] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [{"type": "text", "text": "See"}, used]},
        {"role": "user", "content": [result, {"type": "text", "text": "show"}]},
    ]
    count = tool_client.messages.count_tokens(model="stub", messages=messages, tools=TOOLS).input_tokens
    openai_tools = [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Now", "parameters": TOOLS[0]["input_schema"]},
        }
    ]
    call = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": OSLO}}
    same = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "See", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "5"},
        {"role": "user", "content": "show"},
    ]
    assert count == tool_server.post("/tokenize", {"messages": same, "tools": openai_tools}).json["count"]


def test_thoughts_of_earlier_turns_reach_the_template_and_redacted_ones_do_not() -> None:
    blocks: list[Any] = [
        {"type": "thinking", "thinking": "It rains.", "signature": "x"}, {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Wet."}, {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
    ]  # fmt: skip
    for chosen, calls in ((blocks[:3], False), (blocks, True)):
        body = {"max_tokens": 1, "messages": [*HI, {"role": "assistant", "content": chosen}, *HI]}
        (prompt,) = parse_message(json.dumps(body).encode()).prompts
        assert isinstance(prompt, Conversation)
        _, turn, _ = prompt.messages
        assert (turn["reasoning_content"], turn["reasoning"], "tool_calls" in turn) == ("It rains.", "It rains.", calls)


@pytest.mark.parametrize(
    ("blocks", "thoughts"),
    [
        ([{"type": "thinking", "thinking": "It rains.", "signature": "x"}], {"reasoning_content": "It rains.", "reasoning": "It rains."}),
        ([{"type": "redacted_thinking", "data": "x"}], {}),
    ],
)  # fmt: skip
def test_a_turn_of_thoughts_alone_is_the_one_that_is_continued(
    blocks: list[dict[str, str]], thoughts: dict[str, str], server: Server
) -> None:
    body = {"max_tokens": 1, "messages": [*HI, {"role": "assistant", "content": blocks}]}
    (prompt,) = parse_message(json.dumps(body).encode()).prompts
    assert isinstance(prompt, Conversation)
    assert prompt.messages[1:] == [{"role": "assistant", "content": "", **thoughts}]
    assert prompt.continue_final_message
    same = {"messages": prompt.messages, "add_generation_prompt": False, "continue_final_message": True}
    count = server.post(f"{PATH}/count_tokens", {"messages": body["messages"]})
    assert count.json["input_tokens"] == server.post("/tokenize", same).json["count"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "assistant's messages may hold thinking"),
    ({"messages": [{"role": "user", "content": [{"type": "search_result"}]}]}, "type 'search_result' of messages[0].content[0] is not"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "0 messages"),
    ({"messages": [{"role": "user", "content": []}]}, "no content"),
    ({"messages": [{"role": "system", "content": "a"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image blocks are not supported"),
    ({"system": [{"type": "document", "source": {}}]}, "document blocks are not supported"),
    ({"system": [{"text": "without its type"}]}, "type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, "tool_use"),
    ({"messages": [*HI, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "tool_result"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "type"),
    ({"temperature": 3}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"top_q": 1}, "top_q"),
    ({"output_config": {"effort": "high"}}, "output_config.effort='high' is not supported by this server, which cannot tell a model "
     "how long to think; leave it out"),
    ({"output_config": {"effort": {"budget": 5}}}, "output_config.effort="),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "output_config"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], reason: str) -> None:
    answer = server.post(PATH, {"model": "stub", "max_tokens": 5, "messages": HI, **fields})
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert reason in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "error", "kind"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
        ({"max_tokens": 9999}, anthropic.BadRequestError, "invalid_request_error"),
    ],
)
def test_errors_become_the_clients_own(
    client: anthropic.Anthropic, fields: dict[str, Any], error: type[anthropic.APIStatusError], kind: str
) -> None:
    with pytest.raises(error) as caught:
        client.messages.create(**{"model": "stub", "max_tokens": 5, "messages": HI, **fields})
    assert caught.value.body["error"]["type"] == kind  # type: ignore[index]


def test_an_error_inside_a_stream_is_raised(model_directory: Path) -> None:
    with stub_server(model_directory, {"model_names": ["stub"]}, fail_after_steps=4, step_seconds=0.1) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        with client, pytest.raises(anthropic.APIStatusError, match="the stub broke"):
            list(client.messages.create(model="stub", max_tokens=90, messages=HI, stream=True))


def test_a_key_may_come_as_the_clients_send_it(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    with stub_server(model_directory, {"api_key_file": str(tmp_path / "keys")}) as server:
        for key, status in (("right", 200), ("wrong", 401)):
            answer = server.post(PATH, {"max_tokens": 5, "messages": HI}, **{"x-api-key": key})
            assert answer.status == status
        assert answer.json["error"]["type"] == "authentication_error"
