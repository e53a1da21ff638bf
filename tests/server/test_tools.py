"""Tools through the template and calls out of the answer, as the official client sees them. The stub repeats the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from .servers import Server, stub_server

PATH = "/v1/chat/completions"
END = "<|end|>"
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "add")
]
OSLO = '{"city": "Oslo"}'
ANSWERS = {
    "hermes": f'See: <tool_call>{{"name": "weather", "arguments": {OSLO}}}</tool_call><tool_call>{{"name": "add"}}</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {OSLO}}}; {{"name": "add", "parameters": {{}}}}',
    "qwen3_coder": "See: <tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=add>\n</function>\n</tool_call>",
    "mistral": f'See: [TOOL_CALLS][{{"name": "weather", "arguments": {OSLO}}}, {{"name": "add", "arguments": {{}}}}]',
}
TAUGHT = {
    "hermes": '<tool_call>{"name": ',
    "llama3_json": '{"name": function name, "parameters": dictionary',
    "mistral": "[TOOL_CALLS]",
    "qwen3_coder": "<function=",
}
TEMPLATE = (
    "{%% if messages[-1].content == 'show' %%}{{ tools | tojson }}"
    "{{ messages | selectattr('tool_calls', 'defined') | map(attribute='tool_calls') | list | tojson }}"
    "{%% else %%}{{ messages[-1].content }}{%% endif %%}{# %s #}"
)


def directory(path: Path, model_directory: Path, template: str) -> Path:
    Tokenizer.from_file(str(model_directory / "tokenizer.json")).save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture(scope="module", params=sorted(ANSWERS))
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(form: str, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = directory(tmp_path_factory.mktemp(form), model_directory, TEMPLATE % TAUGHT[form])
    with stub_server(made, {"model_names": ["stub"]}, max_model_len=2000) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def ask(server: Server) -> dict[str, Any]:
    """Fields of a request whose answer ends with the prompt."""
    (end,) = server.post("/tokenize", {"prompt": END}).json["tokens"]
    return {"model": "stub", "tools": TOOLS, "extra_body": {"stop_token_ids": [end]}}


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_calls_of_a_whole_answer(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    choice = client.chat.completions.create(messages=user(ANSWERS[form] + END), n=2, **ask).choices[1]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == (None if form == "llama3_json" else "See:")
    assert choice.message.tool_calls is not None
    calls = [call for call in choice.message.tool_calls if call.type == "function"]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", OSLO), ("add", "{}")]
    assert len({call.id for call in calls}) == 2
    assert all(len(call.id) == 9 for call in calls) == (form == "mistral")


def test_streamed_calls_add_up_to_the_same(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    with client.chat.completions.stream(messages=user(ANSWERS[form] + END), **ask) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == (None if form == "llama3_json" else "See:") or choice.message.content == ""
    assert choice.message.tool_calls is not None
    found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert found == [("weather", OSLO), ("add", "{}")]
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in deltas if call.id] == [0, 1]
    assert sum(bool(call.function and call.function.arguments) for call in deltas) >= 2, "arguments come as they grow"


def test_one_call_where_parallel_calls_are_not_wanted(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    answer = client.chat.completions.create(messages=user(ANSWERS[form] + END), parallel_tool_calls=False, **ask)
    assert [call.function.name for call in answer.choices[0].message.tool_calls or [] if call.type == "function"] == [
        "weather"
    ]


def test_text_that_is_no_call_stays_text(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    choice = client.chat.completions.create(messages=user("Nothing to call.\n" + END), **ask).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("Nothing to call.\n", None)
    assert choice.finish_reason == "stop"


def test_a_call_cut_off_by_the_limit_says_length(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    text = ANSWERS[form]
    cut = text.index("Oslo") + 2
    choice = client.chat.completions.create(messages=user(text + END), max_tokens=cut, **ask).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    (arguments,) = [call.function.arguments for call in choice.message.tool_calls if call.type == "function"]
    assert arguments == ("" if form == "qwen3_coder" else '{"city": "Os')


def test_a_call_cut_off_by_a_stop_text_says_stop(form: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    fields = {**ask, "messages": user(ANSWERS[form] + END), "stop": ["slo"]}
    choice = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    for one in (choice, streamed):
        assert one.finish_reason == "stop"
        assert one.message.tool_calls is not None
        (arguments,) = [call.function.arguments for call in one.message.tool_calls if call.type == "function"]
        assert arguments == ("" if form == "qwen3_coder" else '{"city": "O')


def test_without_tools_or_with_choice_none_nothing_is_parsed(
    form: str, client: openai.OpenAI, ask: dict[str, Any]
) -> None:
    for fields in ({**ask, "tool_choice": "none"}, {name: value for name, value in ask.items() if name != "tools"}):
        message = client.chat.completions.create(messages=user(ANSWERS[form] + END), **fields).choices[0].message
        assert (message.content, message.tool_calls) == (ANSWERS[form], None)


def test_a_required_call_is_read_from_json(client: openai.OpenAI, ask: dict[str, Any], server: Server) -> None:
    text = f'[{{"name": "weather", "parameters": {OSLO}}}, {{"name": "add", "parameters": {{}}}}]'
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    fields = {**ask, "messages": user(text + END), "tools": tools, "tool_choice": "required"}
    choice = client.chat.completions.create(**fields).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert calls_of(choice.message.tool_calls) == [("weather", OSLO), ("add", "{}")]
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert calls_of(streamed.message.tool_calls) == [("weather", OSLO), ("add", "{}")]
    one = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    assert calls_of(one.message.tool_calls) == [("weather", OSLO)]


def test_the_answer_to_a_named_choice_is_its_arguments(client: openai.OpenAI, ask: dict[str, Any]) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    choice = client.chat.completions.create(messages=user(OSLO + END), tool_choice=named, **ask).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", None)
    assert calls_of(choice.message.tool_calls) == [("weather", OSLO)]


def calls_of(calls: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in calls or []]


def test_the_template_gets_tools_and_earlier_calls(server: Server) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"},
        {"role": "user", "content": "show"},
    ]
    strange = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": None, "strict": False}}, TOOLS[1]]
    tokens = server.post("/tokenize", {"messages": messages, "tools": strange}).json["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json["prompt"]
    tools, end = json.JSONDecoder().raw_decode(text)
    assert tools == TOOLS
    assert json.loads(text[end:])[0] == [{**call, "function": {"name": "add", "arguments": {"a": 1}}}]


WEATHER = TOOLS[0]["function"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"structured_outputs": {"regex": "a+"}}, "tools"),
    ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, "tools"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": [1]}}}]}, "tools"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/x"}}}]}, "tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ({"messages": [{"role": "tool", "content": "2"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "2", "tool_call_id": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "2", "tool_calls": [{"function": {"name": "add"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}, "messages"),
    ({"parallel_tool_calls": 3}, "parallel_tool_calls"),
]  # fmt: skip


STRICT: list[Any] = [{"type": "function", "function": {**WEATHER, "strict": True}}, TOOLS[1]]


def test_strict_tools_are_held_to_in_every_form(form: str, server: Server) -> None:
    answer = server.post(PATH, {"messages": user("a"), "tools": STRICT, "max_tokens": 1})
    assert answer.status == 200, answer.body


@pytest.mark.parametrize("form", ["qwen3_coder"], indirect=True)
def test_what_a_form_cannot_be_held_to_is_refused_by_name(server: Server) -> None:
    coded = {"type": "object", "properties": {"code": {"type": "string", "pattern": "[a-z]{3}"}}}
    tools = [{"type": "function", "function": {"name": "look", "strict": True, "parameters": coded}}]
    answer = server.post(PATH, {"messages": user("a"), "tools": tools, "max_tokens": 1})
    assert (answer.status, answer.error["param"]) == (400, "tools")
    assert (
        "'look' is strict, but a call in this model's form cannot be held to pattern of 'code'"
        in answer.error["message"]
    )


def test_malformed_strict_schemas_are_refused_in_every_form(form: str, server: Server) -> None:
    for more in ({"required": 5}, {"required": [["a"]]}, {"properties": 5}, {"properties": {"a": {"enum": 5}}}):
        parameters = {"type": "object", "properties": {"a": {"type": "string"}}, **more}
        tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
        answer = server.post(PATH, {"messages": user("a"), "tools": tools, "max_tokens": 1})
        assert (answer.status, answer.error["param"]) == (400, "tools"), more


@pytest.mark.parametrize("strict", [False, True])
def test_references_in_circles_fail_no_answer(form: str, strict: bool, server: Server) -> None:
    definitions: dict[str, Any] = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}
    definitions |= {"a60": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/a60"}]}}
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": definitions}
    tools = [{"type": "function", "function": {"name": "f", "strict": strict, "parameters": parameters}}]
    answer = server.post(PATH, {"messages": user("a"), "tools": tools, "max_tokens": 1})
    assert answer.status == 200, answer.body


@pytest.mark.parametrize("form", ["hermes"], indirect=True)
@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, {"messages": user("a"), "tools": TOOLS, **fields})
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("template", "settings", "reason"),
    [
        ("{{ messages[-1].content }}", {}, "does not take tools"),
        ("{{ messages[-1].content }}{{ tools }}", {}, "does not know how the model writes tool calls"),
        (TEMPLATE % TAUGHT["hermes"], {"tool_call_parser": "none"}, "does not know how the model writes tool calls"),
        ("{{ messages[-1].content }}{{ tools and '' }}", {"tool_call_parser": "hermes"}, None),
    ],
)
def test_tools_need_a_template_and_a_form(
    model_directory: Path, tmp_path: Path, template: str, settings: dict[str, str], reason: str | None
) -> None:
    with stub_server(directory(tmp_path, model_directory, template), settings) as server:
        answer = server.post(PATH, {"messages": user("a"), "tools": TOOLS, "max_tokens": 1})
        if reason is None:
            assert answer.status == 200
        else:
            assert (answer.status, answer.error["param"]) == (400, "tools")
            assert reason in answer.error["message"]
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
        if "tool_calls" not in template:
            refused = server.post(PATH, {"messages": [call, *user("a")]})
            assert (refused.status, refused.error["param"]) == (400, "messages")
