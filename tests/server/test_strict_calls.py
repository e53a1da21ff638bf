"""Grammars of strict tools in every form of calls: free text passes, and from a call's mark on nothing but what the schemas allow.

llguidance decides, with the demo's tokenizer, whose vocabulary has no marks, and with one where each mark is a special token. What it
lets through is read by the readers of calls and checked by jsonschema.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from random import Random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import tokenizers

from phalanx.runtime.guidance import check_guide
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.forced_calls import arguments_schema
from phalanx.runtime.server.openai.strict_calls import strict_grammar
from phalanx.runtime.server.openai.tools import Tool, tool_use
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.tool_calls import TOOL_CALL_FORMS, tool_call_reader

from .servers import ROOT

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

WEATHER: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}, "wet": {"type": "boolean"},
                   "note": {"type": ["string", "null"]}},
    "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
}  # fmt: skip
FUNCTIONS: list[tuple[str, dict[str, Any]]] = [("weather", WEATHER), ("add", {"type": "object"})]
SCHEMAS: dict[str, Any] = dict(FUNCTIONS)
VERDICT: dict[str, Any] = {
    "type": "object", "properties": {"good": {"type": "boolean"}, "of": {"$ref": "#/$defs/of"}}, "required": ["good"],
    "additionalProperties": False, "$defs": {"of": {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}},
}  # fmt: skip
DEEPSEEK = {name: f"<\uff5ctool\u2581{name.replace(' ', chr(0x2581))}\uff5c>" for name in
            ("calls begin", "calls end", "call begin", "sep", "call end")}  # fmt: skip
FORMS = sorted(TOOL_CALL_FORMS)
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>", "<arg_key>", "</arg_key>",
         "<arg_value>", "</arg_value>", *DEEPSEEK.values())  # fmt: skip
OPENINGS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "qwen3_coder": "<tool_call>", "glm45": "<tool_call>",
            "deepseek_v3": DEEPSEEK["calls begin"], "llama3_json": "{", "pythonic": "["}  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "special"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The demo's, where marks are characters or special tokens."""
    backend = tokenizers.Tokenizer.from_file(str(ROOT / "checkpoints/demo/tokenizer.json"))
    if request.param == "special":
        backend.add_special_tokens(list(MARKS))
    return Tokenizer(backend, {}, None)


@functools.cache
def compiled(form: str, tokenizer: Tokenizer, is_json: bool = False) -> Any:
    grammar = strict_grammar(form, FUNCTIONS, tokenizer, VERDICT if is_json else None)
    matcher = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0)
    assert not matcher.get_error()
    return matcher


@functools.cache
def vocabulary(tokenizer: Tokenizer) -> Any:
    return llguidance.LLTokenizer(tokenizer.to_json())


def parser(form: str, tokenizer: Tokenizer, is_json: bool = False) -> Any:
    """At the start of an answer."""
    return compiled(form, tokenizer, is_json).deep_copy()


def fits(form: str, tokenizer: Tokenizer, text: str, is_json: bool = False) -> bool:
    matcher, token_ids = parser(form, tokenizer, is_json), tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(list(token_ids)) == len(token_ids) and matcher.is_accepting())


def call(form: str, name: str, **arguments: Any) -> str:
    """One call as a model of ``form`` writes it."""
    as_json = json.dumps(arguments)
    match form:
        case "hermes":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {as_json}}}\n</tool_call>'
        case "llama3_json":
            return f'{{"name": "{name}", "parameters": {as_json}}}'
        case "pythonic":
            return f"[{name}({', '.join(f'{key}={python(value)}' for key, value in arguments.items())})]"
        case "qwen3_coder":
            given = "".join(f"<parameter={key}>\n{bare(value)}\n</parameter>\n" for key, value in arguments.items())
            return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"
        case "glm45":
            pairs = [
                f"<arg_key>{key}</arg_key>\n<arg_value>{bare(value)}</arg_value>\n" for key, value in arguments.items()
            ]
            return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"
        case "mistral":
            return f'[TOOL_CALLS][{{"name": "{name}", "arguments": {as_json}}}]'
    tags = DEEPSEEK
    inner = f"function{tags['sep']}{name}\n```json\n{as_json}\n```"
    return tags["calls begin"] + tags["call begin"] + inner + tags["call end"] + tags["calls end"]


def python(value: Any) -> str:
    return str(value) if isinstance(value, bool) else json.dumps(value)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def written(form: str, tokenizer: Tokenizer, name: str, **arguments: Any) -> str:
    """As `call`; models whose tokenizer has the mark for it put a name before its arguments."""
    if form == "mistral" and tokenizer.token_id("[ARGS]") is not None:
        return f"[TOOL_CALLS]{name}[CALL_ID]aB3dE6gH9[ARGS]{json.dumps(arguments)}"
    return call(form, name, **arguments)


def read(form: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer, as a client gets them."""
    reader = tool_call_reader(form, list(SCHEMAS), schemas=SCHEMAS)
    plain, calls = "", dict[int, tuple[str, str]]()
    for piece in reader.push(text) + reader.finish():
        if piece.call is None:
            plain += piece.text
        else:
            name, arguments = calls.get(piece.call, ("", ""))
            calls[piece.call] = piece.name or name, arguments + piece.text
    return plain, [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["", "It rains.", "\n\n a < b, <tool, f(x) = {1} [2]", "é🙂" * 9])
def test_a_model_may_answer_in_words(form: str, text: str, tokenizer: Tokenizer) -> None:
    assert fits(form, tokenizer, text)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [{"city": "Oslo", "days": 3}, {"city": "Rome", "days": -12, "wet": True, "note": "a b"},
                                   {"city": "Rome", "days": 0, "note": "it's \"so\"" }])  # fmt: skip
def test_a_call_that_matches_its_schema_passes_and_is_read_as_it_is(
    form: str, given: dict[str, Any], tokenizer: Tokenizer
) -> None:
    text = written(form, tokenizer, "weather", **given)
    assert fits(form, tokenizer, text)
    assert read(form, text) == ("", [("weather", given)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [{"city": "Paris", "days": 3}, {"city": "Oslo"}, {"city": "Oslo", "days": 1.5}, {},
                                   {"city": "Oslo", "days": 3, "hour": 4}, {"city": "Oslo", "days": "3 "}])  # fmt: skip
def test_a_call_that_breaks_its_schema_does_not(form: str, given: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert not fits(form, tokenizer, written(form, tokenizer, "weather", **given))


@pytest.mark.parametrize("form", FORMS)
def test_functions_that_are_not_strict_take_any_arguments_and_unknown_names_do_not_pass(
    form: str, tokenizer: Tokenizer
) -> None:
    assert fits(form, tokenizer, written(form, tokenizer, "add", x="one", y="two"))
    assert not fits(form, tokenizer, written(form, tokenizer, "delete", x="one"))


@pytest.mark.parametrize("form", sorted({*FORMS} - {"llama3_json", "pythonic"}))
def test_marked_calls_may_stand_between_texts(form: str, tokenizer: Tokenizer) -> None:
    one, other = (written(form, tokenizer, "weather", city=city, days=1) for city in ("Oslo", "Rome"))
    assert fits(form, tokenizer, f"Let me look. {one}\n{other} Done.")
    wrong = written(form, tokenizer, "weather", city="Bonn", days=1)
    assert not fits(form, tokenizer, f"Let me look. {one}\n{wrong} Done.")


def test_several_calls_without_marks(tokenizer: Tokenizer) -> None:
    one, other = (call("llama3_json", "weather", city=city, days=1) for city in ("Oslo", "Rome"))
    assert fits("llama3_json", tokenizer, f"{one}; {other}")
    text = '[weather(city="Oslo", days=1), weather(city = "Rome",days=2)]'
    assert fits("pythonic", tokenizer, text)
    assert [arguments["city"] for _, arguments in read("pythonic", text)[1]] == ["Oslo", "Rome"]


@pytest.mark.parametrize(
    ("form", "text"),
    [("llama3_json", '\n {"city": "Oslo"}'), ("llama3_json", '<|python_tag|>{"name": "weather", "parameters": {}}'),
     ("pythonic", " [a, b]"), ("pythonic", "<|python_start|>[weather()]"), ("hermes", "<tool_call> none"),
     ("mistral", "[TOOL_CALLS] none"), ("glm45", "<tool_call>weather\n</tool_call>")],
)  # fmt: skip
def test_what_a_reader_takes_for_calls_is_held_to_the_schemas(form: str, text: str, tokenizer: Tokenizer) -> None:
    assert not fits(form, tokenizer, text)


@pytest.mark.parametrize("form", FORMS)
def test_the_characters_of_a_special_mark_are_a_mark(form: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(ROOT / "checkpoints/demo/tokenizer.json"))
    spelt = [list(backend.encode(text, add_special_tokens=False).ids) for text in (OPENINGS[form], " none of them")]
    backend.add_special_tokens(list(MARKS))
    matcher = parser(form, Tokenizer(backend, {}, None))
    assert matcher.try_consume_tokens(spelt[0]) == len(spelt[0])
    assert matcher.try_consume_tokens(spelt[1]) < len(spelt[1])


@pytest.mark.parametrize("form", FORMS)
def test_whatever_follows_a_mark_is_a_call_that_matches(form: str, tokenizer: Tokenizer) -> None:
    complete = (seed for seed in range(20) if walk_is_complete(form, tokenizer, seed))
    assert len(list(itertools.islice(complete, 2))) == 2


def walk_is_complete(form: str, tokenizer: Tokenizer, seed: int) -> bool:
    """Take random tokens among those allowed, after a call's mark, until the answer may end: then its calls must match."""
    random, matcher = Random(seed), parser(form, tokenizer)
    token_ids = list(tokenizer.encode(OPENINGS[form], add_special_tokens=False))
    assert matcher.try_consume_tokens(token_ids) == len(token_ids)
    for _ in range(150):
        if matcher.is_accepting():
            break
        token_ids.append(random_token(matcher, tokenizer, random))
        assert matcher.consume_token(token_ids[-1])
    if not matcher.is_accepting():
        return False
    _, calls = read(form, tokenizer.decode(token_ids, skip_special_tokens=False))
    assert calls
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return True


def random_token(matcher: Any, tokenizer: Tokenizer, random: Random) -> int:
    """One that the grammar allows; more often than not one that may end something."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits[: tokenizer.vocab_size])
    some = [int(token) for token in random.sample(allowed.tolist(), min(len(allowed), 200))]
    ends = [token for token in some if set(tokenizer.token_bytes(token)) & set(b'"}])<>,')]
    return random.choice(ends if ends and random.random() < 0.7 else some)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_in_json_is_calls_or_matches_its_schema(form: str, tokenizer: Tokenizer) -> None:
    one, other = (written(form, tokenizer, "weather", city=city, days=1) for city in ("Oslo", "Bonn"))
    for text, passes in (
        ('{"good": true}', True), ('{"good": false, "of": null}', True), ('{"good": true, "of": "c"}', False), ("{}", False),
        ("It is good.", False), ("", False), (one, True), (other, False), (f"Well: {one}", False), (f'{one}{{"good": true}}', False),
    ):  # fmt: skip
        assert fits(form, tokenizer, text, is_json=True) == passes, text
    assert read(form, '{"good": true, "of": "a"}') == ('{"good": true, "of": "a"}', [])


@pytest.mark.parametrize("form", FORMS)
def test_the_http_side_can_try_grammars_with_special_tokens(form: str, tokenizer: Tokenizer) -> None:
    check_guide(GuideRule().check("tools", {"grammar": strict_grammar(form, FUNCTIONS, tokenizer)}))


ONE: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "string"}}}


@pytest.mark.parametrize(
    ("form", "schema", "what"),
    [
        ("pythonic", {**ONE, "anyOf": [{"required": ["x"]}]}, "'anyOf' of its schema"),
        ("glm45", {**ONE, "required": ["y"]}, "'y', which is required and not among its properties"),
        ("pythonic", {"type": "object", "properties": {"a b": {}}}, "'a b', which is no name in Python"),
        ("qwen3_coder", {**ONE, "properties": {"x": {"type": "string", "minLength": 2}}}, "minLength of 'x'"),
        ("glm45", {**ONE, "properties": {"x": {"anyOf": [{"type": "string", "format": "date"}]}}}, "format of 'x'"),
    ],
)
def test_what_a_form_cannot_be_held_to_is_named(
    form: str, schema: dict[str, Any], what: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ApiError, match="leave strict out, or use tool_choice 'required'") as caught:
        strict_grammar(form, [("f", schema)], tokenizer)
    assert what in str(caught.value)


def strict_tools(*names: str) -> Sequence[Tool]:
    return [
        msgspec.convert(
            {"type": "function", "function": {"name": name, "parameters": SCHEMAS[name], "strict": name in names}}, Tool
        )
        for name in SCHEMAS
    ]


def test_strict_holds_for_the_functions_that_say_so(tokenizer: Tokenizer) -> None:
    use = tool_use(strict_tools("weather"), "auto", None)
    assert use is not None
    assert use.strict == {"weather"}
    assert "structured_outputs" not in use.sampling({})
    guide = use.guide("hermes", tokenizer, None)["structured_outputs"]
    assert '"const": "add"}, "arguments": {"type": "object"}' in guide.text
    forced, free = tool_use(strict_tools("weather"), "required", None), tool_use(strict_tools(), "auto", None)
    assert forced is not None
    assert free is not None
    assert not forced.strict
    assert free.guide("hermes", tokenizer, None) == {}


def test_words_for_the_model_are_no_part_of_a_guide() -> None:
    """Sixty tools of an agent, of which each argument is described at length, are within the limit on guides."""
    described = {"type": "string", "title": "T", "description": "x" * 200, "default": "d", "examples": ["e"]}
    schema = {
        "type": "object", "description": "d", "required": ["description", "title"], "additionalProperties": False,
        "properties": {"description": described, "title": {"enum": ["default", "examples"], "title": "T"}, "list": {"items": described},
                       "one": {"anyOf": [described, {"$ref": "#/$defs/title"}]}},
        "$defs": {"title": {**described, "const": {"title": 1}}},
    }  # fmt: skip
    text = {"type": "string"}
    assert arguments_schema(schema) == {
        "type": "object", "required": ["description", "title"], "additionalProperties": False,
        "properties": {"description": text, "title": {"enum": ["default", "examples"]}, "list": {"items": text},
                       "one": {"anyOf": [text, {"$ref": "#/$defs/title"}]}},
        "$defs": {"title": {**text, "const": {"title": 1}}},
    }  # fmt: skip
    many = [msgspec.convert({"function": {"name": f"f{n}", "parameters": schema}}, Tool) for n in range(60)]
    use = tool_use(many, "required", None)
    assert use is not None
    assert len(use.sampling({})["structured_outputs"].text) < 65_536


@pytest.mark.parametrize("form", FORMS)
def test_many_tools_are_within_the_limit_on_guides(form: str, tokenizer: Tokenizer) -> None:
    """Sixty, of which every argument is required, as OpenAI's strict mode wants it."""
    kinds: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "integer"},
        {"items": {"type": "string"}, "type": "array"},
    ]
    names = [f"argument_{index}" for index in range(8)]
    schema = {
        "type": "object", "required": names, "additionalProperties": False,
        "properties": {name: kinds[index % 3] for index, name in enumerate(names)},
    }  # fmt: skip
    grammar = strict_grammar(form, [(f"tool_{index}", schema) for index in range(60)], tokenizer)
    check_guide(GuideRule().check("tools", {"grammar": grammar}))
    matcher = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0)
    given = {name: ("a b", 7, ["c"])[index % 3] for index, name in enumerate(names)}
    for arguments, passes in ((given, True), ({**given, "argument_1": "7 "}, False), ({"argument_0": "a"}, False)):
        token_ids = list(tokenizer.encode(written(form, tokenizer, "tool_59", **arguments), add_special_tokens=False))
        asked = matcher.deep_copy()
        assert (asked.try_consume_tokens(token_ids) == len(token_ids) and asked.is_accepting()) == passes
