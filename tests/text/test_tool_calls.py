"""Tool calls are found in a growing answer, wherever tokens begin and end, and what is no call stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phalanx.runtime.server.settings import TOOL_CALL_PARSERS
from phalanx.runtime.text.tool_calls import (
    TOOL_CALL_FORMS,
    ArgumentsReader,
    CallListReader,
    ToolCallReader,
    detect_form,
    shows_tool_calls,
    takes_tools,
    tool_call_reader,
)
from phalanx.runtime.text.tool_calls.arguments import of_text

from . import chat_templates

NAMES = ("weather", "add")
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": ["integer", "null"]},
            "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "near": {"type": "array"},
        },
    }
}
Calls = list[tuple[str, str]]

CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Just text.", "Just text.", []),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', "",
     [("weather", '{"city": "Oslo"}')]),
    ("hermes", 'Let me see.\n\n<tool_call>{"arguments": {"a": [1, {"b": "}"}]}, "name": "add"}</tool_call>', "Let me see.",
     [("add", '{"a": [1, {"b": "}"}]}')]),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "weather", "arguments": '
     '{"city": "a \\"b\\" \\\\"}}\n</tool_call>', "", [("add", "{}"), ("weather", '{"city": "a \\"b\\" \\\\"}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call> done', "done", [("add", "{}")]),
    ("hermes", '<tool_call>{"id": 7, "name": "add", "arguments": {"a": null}}</tool_call>', "", [("add", '{"a": null}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", "<tool_call>\nno JSON\n</tool_call>", "<tool_call>\nno JSON\n</tool_call>", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "ends with spaces \n", "ends with spaces \n", []),
    ("llama3_json", "It is 5 degrees.", "It is 5 degrees.", []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Oslo"}}', "", [("weather", '{"city": "Oslo"}')]),
    ("llama3_json", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}', "",
     [("add", '{"a": 1}'), ("add", '{"a": 2}')]),
    ("llama3_json", '{"name": "Ada", "parameters": {"born": 1815}}', '{"name": "Ada", "parameters": {"born": 1815}}', []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '<|python_tag|>print(1)', "<|python_tag|>print(1)", []),
    ("llama3_json", 'Use {"name": "add", "parameters": {}}.', 'Use {"name": "add", "parameters": {}}.', []),
    ("llama3_json", "<|python_tag|>", "<|python_tag|>", []),
    ("mistral", "Bonjour [1]", "Bonjour [1]", []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "add", "arguments": {"a": 1}}]', "",
     [("weather", '{"city": "Oslo"}'), ("add", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}]', "", [("add", "{}")]),
    ("mistral", 'Sure.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": {"b": 2}}', "Sure.",
     [("weather", '{"city": "Oslo"}'), ("add", '{"a": {"b": 2}}')]),
    ("mistral", '[TOOL_CALLS]add{"a": 1}', "", [("add", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]", []),
    ("mistral", "[TOOL_CALLS]not a name {", "[TOOL_CALLS]not a name {", []),
    ("pythonic", "It is 5 degrees.", "It is 5 degrees.", []),
    ("pythonic", '[weather(city="Oslo")]', "", [("weather", '{"city": "Oslo"}')]),
    ("pythonic", "[weather(city='San Francisco', metric='celsius'), add(a=-1, b=[2, 3.5], c={'x': True}, d=None)]", "",
     [("weather", '{"city": "San Francisco", "metric": "celsius"}'), ("add", '{"a": -1, "b": [2,3.5], "c": {"x":true}, "d": null}')]),
    ("pythonic", "<|python_start|>[add(), add(a=true)]<|python_end|>", "", [("add", "{}"), ("add", '{"a": true}')]),
    ("pythonic", "[ add(a='1, (2)] \\' \"3\"', b=x + 1) ]", "", [("add", '{"a": "1, (2)] \' \\"3\\"", "b": "x + 1"}')]),
    ("pythonic", "[weather('Oslo', 3)]", "", [("weather", '{"city": "Oslo", "days": 3}')]),
    ("pythonic", '[weather(city="Os', "", [("weather", "")]),
    ("pythonic", "[print(1)]", "[print(1)]", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[weather]", "[weather]", []),
    ("qwen3_coder", "Just text.", "Just text.", []),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n"
     "</tool_call>", "", [("weather", '{"city": "Oslo", "days": 3}')]),
    ("qwen3_coder", "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n  12\n  \"<b>\"\n</parameter>\n<parameter=exact>\nFalse\n</parameter>\n"
     "<parameter=near>\n[1, {\"a\": null}]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>", "I look.",
     [("weather", '{"city": "  12\\n  \\"<b>\\"", "exact": false, "near": [1,{"a":null}]}'), ("add", "{}")]),
    ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=free>\nNaN\n</parameter>\n</function>\n</tool_call> done", "done", [("add", '{"free": "NaN"}')]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3", "",
     [("weather", '{"city": "Oslo"')]),
    ("qwen3_coder", '<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": "add"}</tool_call>', []),
    ("qwen3_coder", "<tool_call>\n<function=no name>", "<tool_call>\n<function=no name>", []),
    ("glm45", "a < b <tool", "a < b <tool", []),
    ("glm45", "I look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
     "</tool_call>\n<tool_call>add\n</tool_call>", "I look.", [("weather", '{"city": "Oslo", "days": 3}'), ("add", "{}")]),
    ("glm45", "<tool_call>weather<arg_key>city</arg_key><arg_value>null</arg_value><arg_key>exact</arg_key><arg_value>true</arg_value></tool_call>", "",
     [("weather", '{"city": "null", "exact": true}')]),
    ("glm45", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>two\nlines</arg_value>\n</tool_call>", "", [("add", '{"a": "two\\nlines"}')]),
    ("glm45", "<tool_call>two words\n</tool_call>", "<tool_call>two words\n</tool_call>", []),
    ("deepseek_v3", "Bonjour", "Bonjour", []),
    ("deepseek_v3", "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>weather\n```json\n{\"city\": \"Oslo\"}\n```<\uff5ctool\u2581call\u2581end\uff5c>\n<\uff5ctool\u2581call\u2581begin\uff5c>function"
     "<\uff5ctool\u2581sep\uff5c>add\n```json\n{}\n```<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>", "", [("weather", '{"city": "Oslo"}'), ("add", "{}")]),
    ("deepseek_v3", "Sure.<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>weather<\uff5ctool\u2581sep\uff5c>{\"city\": \"Oslo\"}<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>{}<\uff5ctool\u2581call\u2581end\uff5c>"
     "<\uff5ctool\u2581calls\u2581end\uff5c>", "Sure.", [("weather", '{"city": "Oslo"}'), ("function", "{}")]),
    ("deepseek_v3", "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>weather<\uff5ctool\u2581sep\uff5c>{\"city\": \"Os", "", [("weather", '{"city": "Os')]),
    ("deepseek_v3", "<\uff5ctool\u2581calls\u2581begin\uff5c>none", "<\uff5ctool\u2581calls\u2581begin\uff5c>none", []),
    ("deepseek_v3", "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>add\n<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>weather\n```json\n{\"days\": 1}\n```<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>", "",
     [("add", "{}"), ("weather", '{"days": 1}')]),
    ("pythonic", '[add(a="""He said "no", (twice""", b=\'\'\'it\'s\n[\'\'\', c="", d=\'\')]', "",
     [("add", '{"a": "He said \\"no\\", (twice", "b": "it\'s\\n[", "c": "", "d": ""}')]),
    ("pythonic", '[add(a="two\nlines, (one string", b="""a\\"""b""")]', "", [("add", '{"a": "two\\nlines, (one string", "b": "a\\"\\"\\"b"}')]),
    ("pythonic", "[add(a=-3, b=-0.5, c=[-1, +2], d={'x': -1e-3}, e=- 4)]", "",
     [("add", '{"a": -3, "b": -0.5, "c": [-1,2], "d": {"x":-0.001}, "e": -4}')]),
    ("pythonic", "[add(a=dict(x=-1, y=[true, None]), b=set([1]), c=(1, 'a'), d=list(), e=date(2024, 5, 1), f=add(a=1, b='(,'), g=b'x')]", "",
     [("add", '{"a": {"x":-1,"y":[true,null]}, "b": [1], "c": [1,"a"], "d": [], "e": "date(2024, 5, 1)", "f": "add(a=1, b=\'(,\')", "g": "b\'x\'"}')]),
    ("pythonic", '[weather(near=[true, null], city={"a": false})]', "", [("weather", '{"near": [true,null], "city": {"a":false}}')]),
]  # fmt: skip


UNKNOWN: list[tuple[str, str, str, Calls]] = [
    ("hermes", '<tool_call>{"name": "fly", "arguments": {"to": 1}}</tool_call>', "", [("fly", '{"to": 1}')]),
    ("mistral", '[TOOL_CALLS][{"name": "fly", "arguments": {"to": 1}}]', "", [("fly", '{"to": 1}')]),
    ("mistral", '[TOOL_CALLS]fly[ARGS]{"to": 1}', "", [("fly", '{"to": 1}')]),
    ("qwen3_coder", "<tool_call>\n<function=fly>\n<parameter=to>\n1\n</parameter>\n</function>\n</tool_call>", "", [("fly", '{"to": 1}')]),
    ("glm45", "<tool_call>fly\n<arg_key>to</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "", [("fly", '{"to": 1}')]),
    ("deepseek_v3", "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>fly<\uff5ctool\u2581sep\uff5c>{\"to\": 1}"
     "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>", "", [("fly", '{"to": 1}')]),
    ("llama3_json", '<|python_tag|>{"name": "fly", "parameters": {"to": 1}}', "", [("fly", '{"to": 1}')]),
    ("llama3_json", '{"name": "add", "parameters": {}}; {"name": "fly", "parameters": {"to": 1}}', "", [("add", "{}"), ("fly", '{"to": 1}')]),
    ("llama3_json", '{"name": "fly", "parameters": {"to": 1}}', '{"name": "fly", "parameters": {"to": 1}}', []),
    ("pythonic", "<|python_start|>[plane.fly(to=1)]<|python_end|>", "", [("plane.fly", '{"to": 1}')]),
    ("pythonic", "[add(), fly(to=1)]", "", [("add", "{}"), ("fly", '{"to": 1}')]),
    ("pythonic", "<|python_start|>[1, fly(to=1)]", "<|python_start|>[1, fly(to=1)]", []),
    ("pythonic", "[fly(to=1)]", "[fly(to=1)]", []),
]  # fmt: skip
"""The name is not among the functions: a call all the same where a mark shows that it is one, and text where only the name would."""


def read(form: str, tokens: list[str], **options: bool) -> tuple[str, Calls]:
    reader = tool_call_reader(form, NAMES, schemas=SCHEMAS, **options)
    pieces = [piece for token in tokens for piece in reader.push(token)] + reader.finish()
    text, names, arguments = "", list[str](), list[str]()
    for piece in pieces:
        if piece.call is None:
            text += piece.text
        elif piece.name is not None:
            assert piece.call == len(names)
            names.append(piece.name)
            arguments.append(piece.text)
        else:
            arguments[piece.call] += piece.text
    assert reader.num_calls == len(names)
    return text, list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(("form", "answer", "text", "calls"), [*CASES, *UNKNOWN])
def test_calls_and_text_of_an_answer(form: str, answer: str, text: str, calls: Calls) -> None:
    assert read(form, [answer]) == (text, calls)
    assert read(form, list(answer)) == (text, calls)


@pytest.mark.parametrize("kind", [None, 5, {}, [None, "integer"]])
def test_a_schema_that_is_none_takes_anything(kind: object) -> None:
    assert of_text("5", {"properties": {"a": {"type": kind}}}, "a") == 5


@pytest.mark.parametrize(
    ("value", "text", "read"),
    [
        ({"enum": [1, "b"]}, "1", 1), ({"enum": [1, "b"]}, "b", "b"), ({"enum": ["1", "b"]}, "1", "1"), ({"enum": ["x", None]}, "null", None),
        ({"enum": ["x", "null"]}, "null", "null"), ({"enum": ["x", True]}, "true", True), ({"enum": ["x", 1]}, "true", "true"),
        ({"enum": ["x", "y"]}, "5", "5"), ({"anyOf": [{"enum": ["x"]}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"enum": ["x"]}, {"type": "integer"}]}, "x", "x"), ({"anyOf": [{"const": 1}, {"type": "string"}]}, "2", "2"),
        ({"type": "string", "oneOf": [{"const": "1"}, {"const": "2"}]}, "2", "2"), ({"allOf": [{"$ref": "#/$defs/n"}], "minimum": 3}, "4", 4),
        ({"$ref": "#/$defs/text", "description": "d"}, "4", "4"), ({"$ref": "#/$defs/none"}, "4", 4), ({"enum": 5}, "4", 4),
        ({"const": [1, {"a": "b"}]}, '[1, {"a": "b"}]', [1, {"a": "b"}]),
    ],
)  # fmt: skip
def test_bare_text_is_read_by_what_its_schema_takes(value: object, text: str, read: object) -> None:
    definitions = {
        "n": {"type": "integer"},
        "text": {"$ref": "#/$defs/more"},
        "more": {"type": "string", "description": "e"},
    }
    found = of_text(text, {"properties": {"a": value}, "$defs": definitions}, "a")
    assert (found, type(found)) == (read, type(read))


def test_arguments_that_a_schema_does_not_name_are_of_its_additional_properties() -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    assert [of_text("5", schema, key) for key in ("a", "b")] == [5, "5"]


def levels(key: str, num_levels: int, **more: object) -> dict[str, object]:
    """Definitions of which each refers to the next one twice."""
    return {f"a{n}": {key: [{"$ref": f"#/$defs/a{n + 1}", **more}] * 2} for n in range(num_levels)}


@pytest.mark.parametrize(
    "definitions",
    [
        {"a0": {"anyOf": [{"$ref": "#/$defs/a0"}]}}, {"a0": {"$ref": "#/$defs/a0"}}, {"a0": {"$ref": "#/$defs/a0", "minimum": 1}},
        {"a0": {"allOf": [{"$ref": "#/$defs/a0"}]}}, {**levels("anyOf", 60), "a60": {"type": "integer"}},
        {**levels("oneOf", 60, minimum=1), "a60": {"type": "integer"}}, {**levels("anyOf", 5000), "a5000": {"type": "integer"}},
        {"a0": {"anyOf": [{"minimum": n} for n in range(9999)]}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["qwen3_coder", "glm45"])
def test_references_are_followed_once_and_not_for_long(form: str, definitions: dict[str, object]) -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": definitions}
    answer = {
        "qwen3_coder": "<tool_call><function=add><parameter=a>5</parameter></function></tool_call>",
        "glm45": "<tool_call>add<arg_key>a</arg_key><arg_value>5</arg_value></tool_call>",
    }[form]
    reader = tool_call_reader(form, ["add"], schemas={"add": schema})
    assert "".join(piece.text for piece in reader.push(answer) if piece.call == 0) == '{"a": 5}'


@given(st.data())
def test_where_tokens_end_does_not_matter(data: st.DataObject) -> None:
    form, answer, text, calls = data.draw(st.sampled_from([*CASES, *UNKNOWN]))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))) | {0, len(answer)})
    assert read(form, [answer[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]) == (text, calls)


@given(st.sampled_from(sorted(TOOL_CALL_FORMS)), st.text('<tool_call>/{}[]":,;\\ abTOOL_CALLS|python', max_size=60))
def test_no_text_is_lost_unless_a_call_is_found(form: str, answer: str) -> None:
    text, calls = read(form, list(answer))
    assert calls or text == answer


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_any_arguments_come_through_unchanged(
    arguments: dict[str, object], ascii_only: bool, indent: int | None
) -> None:
    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    written = {
        "hermes": "<tool_call>" + dump({"name": "add", "arguments": arguments}) + "</tool_call>",
        "llama3_json": dump({"name": "add", "parameters": arguments}),
        "mistral": "[TOOL_CALLS]" + dump([{"name": "add", "arguments": arguments}]),
    }
    for form, answer in written.items():
        text, [(name, found)] = read(form, list(answer))
        assert (text, name, json.loads(found)) == ("", "add", arguments)


def test_arguments_stream_before_the_call_ends() -> None:
    reader = tool_call_reader("hermes", NAMES)
    assert [piece.name for piece in reader.push('<tool_call>{"name": "add", "arg')] == ["add"]
    assert [piece.text for piece in reader.push('uments": {"a": 1, "b"')] == ['{"a": 1, "b"']


@pytest.mark.parametrize("form", sorted(TOOL_CALL_FORMS))
def test_without_parallel_calls_only_the_first_counts(form: str) -> None:
    answer = next(answer for kind, answer, _, calls in CASES if kind == form and len(calls) == 2)
    text, calls = read(form, [answer])
    assert read(form, [answer], parallel=False) == (text, calls[:1])


def read_with(reader: ToolCallReader, answer: str) -> tuple[str, Calls]:
    pieces = [piece for character in answer for piece in reader.push(character)] + reader.finish()
    names = [piece.name for piece in pieces if piece.name is not None]
    arguments = ["".join(piece.text for piece in pieces if piece.call == index) for index in range(len(names))]
    return "".join(piece.text for piece in pieces if piece.call is None), list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ('[{"name": "add", "parameters": {"a": 1}}]', "", [("add", '{"a": 1}')]),
        (
            '[{"name":"add","parameters":{}},\n{"name":"f","parameters":{"a":[]}}]',
            "",
            [("add", "{}"), ("f", '{"a":[]}')],
        ),
        ('[{"name": "add", "parameters": {"a": 1', "", [("add", '{"a": 1')]),
        ('[{"name": "add", "parameters": {"a": 1}}, ', "", [("add", '{"a": 1}')]),
        ('[{"name": "add", "parameters": {"a": 1}}, {"na', "", [("add", '{"a": 1}')]),
        ('[{"name": "ad', "", []),
        ("[", "", []),
        ("[1]", "[1]", []),
        ("no list", "no list", []),
    ],
)
def test_a_list_of_calls_that_a_grammar_enforces(answer: str, text: str, calls: Calls) -> None:
    assert read_with(CallListReader(NAMES), answer) == (text, calls)


def test_arguments_that_a_grammar_enforces() -> None:
    assert read_with(ArgumentsReader(("add",)), '{"a": 1}') == ("", [("add", '{"a": 1}')])
    assert read_with(ArgumentsReader(("add",)), "") == ("", [])


def test_unknown_names_are_tried_with_every_form() -> None:
    assert {form for form, *_ in UNKNOWN} == set(TOOL_CALL_FORMS)


def test_the_operator_can_choose_every_form() -> None:
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *TOOL_CALL_FORMS}


@pytest.mark.parametrize("name", chat_templates.WITH_TOOLS)
def test_forms_are_recognised_by_what_templates_teach(name: str) -> None:
    source = chat_templates.WITH_TOOLS[name]
    tree = ImmutableSandboxedEnvironment().parse(source)
    assert (takes_tools(tree), shows_tool_calls(tree)) == (True, True)
    assert detect_form(source) == name.partition(":")[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages }}",
        "{{ tools }} <tool_call>{function-name}\n<invoke>",
        "{{ tools }} <tool_call>\n<function=f>\n<arg_key>",
        "{{ tools }} [TOOL_CALLS] <tool_call>{\"name\": ",
    ],
)  # fmt: skip
def test_other_forms_are_not_mistaken_for_known_ones(source: str) -> None:
    assert detect_form(source) is None


@pytest.mark.parametrize(
    ("form", "taught"),
    [
        ("pythonic", "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]"),
        ("qwen3_coder", "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>"),
        ("glm45", "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"),
        ("deepseek_v3", "{{'<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>'}}"),
    ],
)
def test_a_form_is_recognised_by_the_words_of_its_models_templates(form: str, taught: str) -> None:
    assert detect_form("{% for tool in tools %}{% endfor %}" + taught) == form


@given(st.dictionaries(st.text("abc_", min_size=1, max_size=5), JSON, max_size=3))
def test_python_literals_come_through_as_json(arguments: dict[str, object]) -> None:
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    text, [(name, found)] = read("pythonic", list(f"[add({written})]"))
    assert (text, name, json.loads(found)) == ("", "add", arguments)


def test_templates_without_tools_are_recognised() -> None:
    tree = ImmutableSandboxedEnvironment().parse(chat_templates.CHATML)
    assert (takes_tools(tree), shows_tool_calls(tree)) == (False, False)


def test_a_name_nested_too_deeply_leaves_text() -> None:
    text = f'<tool_call>{{"name": {"[" * 100_000}{"]" * 100_000}, "arguments": {{}}}}</tool_call>'
    assert read("hermes", [text]) == (text, [])


def test_arguments_nested_too_deeply_are_like_others_that_are_no_json() -> None:
    def found(arguments: str) -> tuple[str, int]:
        call = json.dumps({"name": "add", "arguments": arguments})
        text, calls = read("hermes", [f"<tool_call>{call}</tool_call>"])
        return text, len(calls)

    assert found("[" * 100_000) == found("[")
