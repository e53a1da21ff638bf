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
from phalanx.runtime.server.openai import forced_calls, grammar_values, tools
from phalanx.runtime.server.openai.forced_calls import arguments_schema, calls_schema
from phalanx.runtime.server.openai.strict_calls import strict_grammar
from phalanx.runtime.server.openai.tools import Tool, ToolChoice, tool_use
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
        (
            "qwen3_coder",
            {
                **ONE,
                "properties": {"x": {"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]}},
                "$defs": {"p": {"type": "string", "pattern": "^[a-z]$"}},
            },
            "pattern of 'x'",
        ),
        ("glm45", {**ONE, "properties": {"x": {"enum": ["ab"], "pattern": "b"}}}, "pattern of 'x'"),
        (
            "qwen3_coder",
            {**ONE, "properties": {"x": {"enum": ["a\n"]}}},
            "'a\\n' of 'x', which this model's calls cannot spell",
        ),
        ("glm45", {**ONE, "properties": {"x": {"enum": ["a</arg_value>"]}}}, "'a</arg_value>' of 'x'"),
        ("qwen3_coder", {"type": "object", "properties": {"a>b": {}}}, "'a>b', which is no name between its tags"),
        ("glm45", {"type": "object", "properties": {" a": {}}}, "' a', which is no name between its tags"),
        ("glm45", {**ONE, "properties": {"x": {"anyOf": [{"type": "string", "format": "date"}]}}}, "format of 'x'"),
    ],
)
def test_what_a_form_cannot_be_held_to_is_named(
    form: str, schema: dict[str, Any], what: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ApiError, match="leave strict out, or use tool_choice 'required'") as caught:
        strict_grammar(form, [("f", schema)], tokenizer)
    assert what in str(caught.value)


@pytest.mark.parametrize("form", ["glm45", "pythonic", "qwen3_coder"])
@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({**ONE, "required": 5}, "required, which is not a list of names"), ({**ONE, "required": [["x"]]}, "required, which is not a list"),
        ({"type": "object", "required": ["x"]}, "'x', which is required and not among its properties"),
        ({"type": "object", "properties": 5}, "properties that are not schemas"), ({"properties": ["x"]}, "properties that are not schemas"),
        ({"properties": {"x": 5}}, "properties that are not schemas"), ({"type": "array"}, "the type 'array', which is not object"),
        ({**ONE, "additionalProperties": 5}, "additionalProperties, which is not a schema"),
        ({"properties": {"x": {"enum": 5}}}, "the enum of 'x', 5, which is not a list"),
    ],
)  # fmt: skip
def test_a_malformed_schema_is_named(form: str, schema: dict[str, Any], what: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as caught:
        strict_grammar(form, [("f", schema)], tokenizer)
    assert what in str(caught.value)
    assert caught.value.status == 400


def test_a_schema_that_is_nested_too_deeply_is_refused(tokenizer: Tokenizer) -> None:
    items: dict[str, Any] = {"type": "string"}
    for _ in range(5_000):
        items = {"type": "array", "items": items}
    for function in (arguments_schema, lambda schema: strict_grammar("glm45", [("f", schema)], tokenizer)):
        with pytest.raises(ApiError, match="nested too deeply; flatten it"):
            function({"type": "object", "properties": {"x": items}})


ROOMS: dict[str, Any] = {"room": {"type": "object", "properties": {"beds": {"type": "integer"}}, "required": ["beds"]},
                         "pattern": {"type": "string", "pattern": "^[a-z]$"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}]}, "a[b]/c": {"type": "object", "required": ["x"]}}  # fmt: skip
TAGGED = ["glm45", "qwen3_coder"]


def fits_one(form: str, tokenizer: Tokenizer, schema: dict[str, Any], *texts: str) -> list[bool]:
    """Whether one function's grammar lets each text through; then the call that is read matches its schema."""
    grammar = strict_grammar(form, [("f", schema), ("free", {"type": "object"})], tokenizer)
    check_guide(GuideRule().check("tools", {"grammar": grammar}))
    matcher, found = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0), []
    for text in texts:
        token_ids, copy = list(tokenizer.encode(text, add_special_tokens=False)), matcher.deep_copy()
        found.append(copy.try_consume_tokens(token_ids) == len(token_ids) and copy.is_accepting())
        reader = tool_call_reader(form, ["f", "free"], schemas={"f": schema})
        pieces = reader.push(text) + reader.finish()
        if found[-1] and reader.num_calls and pieces[0].name == "f":
            jsonschema.validate(json.loads("".join(piece.text for piece in pieces)), schema)
    return found


def of_one_value(value: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"a": value},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": ROOMS,
    }


@pytest.mark.parametrize("form", TAGGED)
@pytest.mark.parametrize(
    ("value", "taken", "refused"),
    [
        ({"anyOf": [{"type": "string", "enum": ["x", "y"]}, {"type": "null"}]}, ["x", "null"], ["zzz", '"x"', ""]),
        ({"oneOf": [{"const": "x"}, {"const": "y"}]}, ["x", "y"], ["z"]), ({"enum": [1, "b", None]}, ["1", "b", "null"], ["2", "true"]),
        ({"type": "string", "enum": ["x", None]}, ["x"], ["null"]), ({"type": ["string", "null"]}, ["zzz", "null", "5"], []),
        ({"anyOf": [{"enum": ["x"]}, {"$ref": "#/$defs/room"}]}, ["x", '{"beds": 2}'], ['{"beds": "2"}', "y"]),
        ({"anyOf": [{"enum": ["x"]}, {"type": "array", "items": {"$ref": "#/$defs/pattern"}}]}, ["x", '["a"]'], ['["aa"]', "a"]),
        ({"anyOf": [{"type": "string"}, {"type": "object", "properties": {"format": {"type": "integer"}}}]}, ["zzz", "{}"], []),
        ({"type": "object", "properties": {"format": {"type": "string"}}, "required": ["format"]}, ['{"format": "x"}'], ["{}", "x"]),
        ({"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": 1}]}, ["1", "3"], ["2"]), ({}, ["zzz", "5"], []), ({"$ref": "#/$defs/a%5Bb%5D~1c"}, ['{"x": 1}'], ["{}"]), (True, ["zzz"], []),
    ],
)  # fmt: skip
def test_every_alternative_of_a_value_between_tags_is_held_to(
    form: str, value: Any, taken: list[str], refused: list[str], tokenizer: Tokenizer
) -> None:
    texts = [call(form, "f", a=text) for text in (*taken, *refused)]
    assert fits_one(form, tokenizer, of_one_value(value), *texts) == [True] * len(taken) + [False] * len(refused)


@pytest.mark.parametrize(
    ("value", "taken", "refused"),
    [
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, ["True", "None", "true", "null"], ["1", '"x"']),
        ({"type": "array", "items": {"type": "boolean"}}, ["[]", "[True, false]", "[true]"], ["[None]", "True", "[1]"]),
        ({"type": "array", "items": {"type": "array", "items": {"type": ["integer", "null"]}}}, ["[[1, None], []]"], ["[[True]]", "[1]"]),
        ({"enum": [True, "x", None]}, ["True", "None", '"x"'], ["False", '"y"']), ({"type": "boolean", "enum": [False, None]}, ["False"], ["None"]),
        ({"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}]}, ['"x"', "None"], ['"z"', "True"]),
        ({"type": "boolean"}, ["True", "true"], ["None"]), ({"$ref": "#/$defs/room"}, ['{"beds": 1}'], ["{}"]),
    ],
)  # fmt: skip
def test_pythons_words_stand_wherever_jsons_do(
    value: Any, taken: list[str], refused: list[str], tokenizer: Tokenizer
) -> None:
    texts = [f"[f(a={text})]" for text in (*taken, *refused)]
    found = fits_one("pythonic", tokenizer, of_one_value(value), *texts)
    assert found == [True] * len(taken) + [False] * len(refused)


@pytest.mark.parametrize("form", [*TAGGED, "pythonic"])
def test_arguments_without_names_are_held_to_their_schema(form: str, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    texts = [
        call(form, "f"),
        call(form, "f", one=1, zwölf=12),
        call(form, "f", one="x"),
        call(form, "f", one=1, two=1.5),
    ]
    assert fits_one(form, tokenizer, schema, *texts) == [True, True, False, False]
    assert fits_one(
        form, tokenizer, {"additionalProperties": {"type": "string"}}, call(form, "f", one="5", two="x")
    ) == [True]


@pytest.mark.parametrize("form", [*TAGGED, "pythonic"])
def test_next_to_a_strict_function_others_take_what_their_reader_does(form: str, tokenizer: Tokenizer) -> None:
    texts = [call(form, "free", 都市="x", flag=True), call(form, "f", a=5)]
    if form == "pythonic":
        texts += ["[free('it\\'s )', [None, (1, 2)], c={'x': True}, d=date(2024, 5), e=-1)]"]
    else:
        texts += [call(form, "free", **{"user-id": "x", "a b": 3})]
    assert fits_one(form, tokenizer, of_one_value({"type": "integer"}), *texts) == [True] * 3


@pytest.mark.parametrize(
    ("form", "name"), [("pythonic", "f("), ("qwen3_coder", "f>"), ("glm45", "f<"), ("deepseek_v3", "f{")]
)
def test_names_that_a_reader_would_cut_are_refused(form: str, name: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ApiError, match=r"cannot be called in this model's form of calls, where '.' ends a name; rename it"
    ):
        strict_grammar(form, [("ok", {}), (name, {})], tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_of_spaces_may_end(form: str, tokenizer: Tokenizer) -> None:
    assert [fits(form, tokenizer, text) for text in (" ", "\n\n", "\t \n")] == [True] * 3


@pytest.mark.parametrize("form", [*TAGGED, "pythonic"])
def test_definitions_stand_where_references_lead_to_them(form: str, tokenizer: Tokenizer) -> None:
    """Twenty arguments and 5 kB of definitions are an ordinary tool."""
    definitions = {f"d{n}": {"type": "object", "properties": {"x" * 200: {"$ref": f"#/$defs/e{n}"}}} for n in range(20)}
    definitions |= {f"e{n}": {"type": ["integer", "null"]} for n in range(20)}
    values = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/d{n}"}, {"type": "null"}]} for n in range(20)}
    schema = {"type": "object", "properties": {**values, "n": {"type": "integer"}}, "$defs": definitions}
    grammar = strict_grammar(form, [("f", schema)], tokenizer)
    assert len(grammar) < 20_000
    check_guide(GuideRule().check("tools", {"grammar": grammar}))


@pytest.mark.parametrize("form", [*TAGGED, "pythonic"])
def test_a_grammar_that_becomes_too_long_is_not_built_to_its_end(
    form: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def counted(schema: dict[str, Any]) -> str:
        built.append(1)
        return json.dumps(schema) + "x" * 1000

    monkeypatch.setattr(grammar_values, "json_rule", counted)
    values = {f"a{n}": {"type": "integer", "minimum": n} for n in range(2000)}
    with pytest.raises(ApiError, match="make a grammar of more than 65536 characters"):
        strict_grammar(form, [("f", {"type": "object", "properties": values})], tokenizer)
    assert len(built) < 70


def test_definitions_of_one_name_are_each_functions_own() -> None:
    """As of two pydantic models of which each has another Item. Those that are the same are said once."""

    def parameters(**item: Any) -> dict[str, Any]:
        listed = {"type": "array", "items": {"$ref": "#/$defs/Item"}}
        definitions = {
            "Item": {"type": "object", "properties": {"const": {"$ref": "#/$defs/Leaf"}}, "required": ["const"]},
            "Leaf": item,
        }
        return {"type": "object", "properties": {"items": listed}, "required": ["items"], "$defs": definitions}

    number, text = parameters(type="integer"), parameters(enum=[{"$ref": "#/$defs/Leaf"}, "x"])
    schema = calls_schema([("f", number), ("g", text), ("h", number), ("i", text)], parallel=True)
    check_guide(GuideRule().check("tools", {"json": schema}))
    assert sorted(schema["$defs"]) == ["2.Item", "2.Leaf", "4.Item", "4.Leaf", "Item", "Leaf"]
    jsonschema.Draft202012Validator.check_schema(schema)
    checked = jsonschema.Draft202012Validator(schema)
    for name, leaf, fits in (
        ("f", 1, True),
        ("f", "x", False),
        ("g", "x", True),
        ("g", {"$ref": "#/$defs/Leaf"}, True),
        ("g", 1, False),
        ("h", 1, True),
    ):
        call = {"name": name, "parameters": {"items": [{"const": leaf}]}}
        assert checked.is_valid([call]) == fits, call


TREE: dict[str, Any] = {
    "type": "object", "required": ["n"], "additionalProperties": False, "$defs": {"root0": {"type": "null"}},
    "properties": {"n": {"type": "integer"}, "m": {"$ref": "#/properties/n"}, "of": {"type": "array", "items": {"$ref": "#"}},
                   "one": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/root0"}]}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_references_to_the_top_of_a_schema_lead_there(form: str, tokenizer: Tokenizer) -> None:
    """As OpenAI documents them for strict schemas that are recursive."""
    grammar = strict_grammar(form, [("f", arguments_schema(TREE)), ("g", arguments_schema(TREE))], tokenizer)
    check_guide(GuideRule().check("tools", {"grammar": grammar}))
    matcher = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0)
    leaf = {"n": 1, "m": 2}
    for arguments in (
        {"n": 1, "of": [leaf, {"n": 2, "of": [leaf], "one": None}], "one": leaf},
        {"n": 1, "of": [1]},
        {"n": 1, "one": {"m": 1}},
    ):
        token_ids = list(tokenizer.encode(written(form, tokenizer, "g", **arguments), add_special_tokens=False))
        copy = matcher.deep_copy()
        fits = copy.try_consume_tokens(token_ids) == len(token_ids) and copy.is_accepting()
        assert fits == jsonschema.Draft202012Validator(TREE).is_valid(arguments)


def test_required_calls_may_be_of_recursive_schemas() -> None:
    checked = jsonschema.Draft202012Validator(calls_schema([("f", TREE), ("g", None)], parallel=True))
    for arguments, fits in (
        ({"n": 1, "of": [{"n": 2}]}, True),
        ({"n": 1, "of": [[]]}, False),
        ({"n": 1, "m": "x"}, False),
    ):
        assert checked.is_valid([{"name": "f", "parameters": arguments}]) == fits


@pytest.mark.parametrize("form", [*TAGGED, "pythonic"])
def test_values_that_are_written_alike_are_of_their_own_functions_definitions(form: str, tokenizer: Tokenizer) -> None:
    def schema(item: dict[str, Any]) -> dict[str, Any]:
        listed = {"type": "array", "items": {"$ref": "#/$defs/item"}}
        return {"type": "object", "properties": {"a": listed, "b": {"$ref": "#/$defs/item"}}, "$defs": {"item": item}}

    functions = [("f", schema({"type": ["boolean", "null"]})), ("g", schema({"type": ["integer", "null"]}))]
    matcher = llguidance.LLMatcher(vocabulary(tokenizer), strict_grammar(form, functions, tokenizer), log_level=0)
    for name, value in itertools.product("fg", (True, 5)):
        for arguments in ({"a": [value]}, {"b": value}):
            token_ids = list(tokenizer.encode(call(form, name, **arguments), add_special_tokens=False))
            taken = matcher.deep_copy().try_consume_tokens(token_ids) == len(token_ids)
            assert taken == ((name == "f") == (value is True)), (name, arguments)


FREE = [
    "",
    "1, 2",
    "a=''",
    r'a="\""',
    r"""a="it's", b='\'('""",
    '''a=""" "a" ("", \\""" """''',
    "a='''b'''",
    "dict(a=[{'(': None}])",
]
UNENDED = ['""")"', "a=(", "'", '''a="""b""""''']


@pytest.mark.parametrize(("text", "is_whole"), [*((text, True) for text in FREE), *((text, False) for text in UNENDED)])
def test_free_arguments_in_python_end_where_their_reader_ends_them(
    text: str, is_whole: bool, tokenizer: Tokenizer
) -> None:
    text = f"[free({text})]"
    assert fits_one("pythonic", tokenizer, of_one_value({"type": "integer"}), text) == [is_whole]
    reader = tool_call_reader("pythonic", ["free"])
    assert "".join(piece.text for piece in reader.push(text) + reader.finish()).endswith("}") == is_whole


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


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize(
    "large",
    [
        {"enum": [0] * 300_000},
        {"properties": {"title": {"enum": ["x" * 300_000]}}},
        {"properties": {"x" * 300_000: {}}},
    ],
)
def test_schemas_that_no_guide_could_hold_are_refused_before_they_are_copied(
    choice: Any, large: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    for module in (forced_calls, tools):
        monkeypatch.setattr(module, "arguments_schema", copied.append)
    described = {
        "name": "f",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "object", **large}}},
    }
    use = tool_use([msgspec.convert({"function": described}, Tool)], msgspec.convert(choice, ToolChoice), None)
    assert use is not None
    with pytest.raises(ApiError, match="more than 262144 characters without descriptions"):
        use.guide("hermes", tokenizer, None) if choice == "auto" else use.sampling({})
    assert not copied


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
