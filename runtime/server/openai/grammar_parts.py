# SPDX-License-Identifier: Apache-2.0
"""Parts of the grammars of calls: marks, JSON values, and arguments that stand one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phalanx.runtime.guidance import JSON_WHITESPACE
from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.tool_calls import property_schema, types_of

__all__ = ["JsonAnswer", "Marks", "Words", "json_rule", "python_arguments", "quoted", "tagged_arguments"]

_DEFINITIONS = ("$defs", "definitions")
_ROOT_KEYS = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}
_ANNOTATIONS = {"title", "description", "$schema", "$id", "$comment", "default", "examples", "deprecated", "strict"}
_OF_TEXTS = ("pattern", "minLength", "maxLength", "format", "contentEncoding", "not", "allOf")
"""Keywords that bare text cannot be held to."""


class Marks:
    """How a grammar spells the texts around calls.

    A special token is named by its id: characters never become it. Readers of calls see no difference, so its characters count, too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> str:
        """``text`` as the token that a model writes."""
        token_id = self._tokenizer.special_id(text)
        return quoted(text) if token_id is None else f"<[{token_id}]>"

    def knows(self, text: str) -> bool:
        """Whether ``text`` is one of the vocabulary's tokens."""
        return self._tokenizer.token_id(text) is not None

    def either(self, text: str) -> str:
        """``text`` as a token or as characters."""
        return f"({self(text)} | {quoted(text)})" if self._tokenizer.special_id(text) is not None else quoted(text)

    def text_until(self, rule: str, mark: str) -> str:
        """The rule ``rule``: free text up to the first ``mark``."""
        token_id = self._tokenizer.special_id(mark)
        if token_id is None:
            return f"{rule}[lazy]: TEXT {quoted(mark)}\n"
        return f"{rule}: TEXT <[{token_id}]> | {rule}_spelt\n{rule}_spelt[lazy]: TEXT {quoted(mark)}\n"


class Words:
    """The rule ``start`` of an answer that is free text where it is no calls; needs the rules ``TEXT`` and ``SPACE``."""

    def with_calls(self, marks: Marks, mark: str, body: str) -> str:
        """Each call is a mark and a ``body``."""
        return f"start: (mark {body})* TEXT\n{marks.text_until('mark', mark)}"

    def or_calls(self, calls: str, bracket: str, lead: str) -> str:
        """The whole answer is ``calls`` if it begins with a ``bracket``, or with ``lead``, which is not let through."""
        blank = r"[\s\x1c-\x1f]"  # what `str.lstrip` takes away
        return (
            f'start: PLAIN | {calls} | ""\n'
            rf"PLAIN: /{blank}*[^\{bracket}\s\x1c-\x1f](.|\n)*/ & ~/{blank}*<\|{lead}\|>(.|\n)*/" + "\n"
        )


class JsonAnswer:
    """The same of an answer that is JSON where it is no calls.

    Args:
        schema: of the JSON.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._rule = f"answer: {json_rule(schema)}\n"

    def with_calls(self, marks: Marks, mark: str, body: str) -> str:
        return f"start: (mark {body})+ SPACE | answer\nmark: SPACE {marks.either(mark)}\n{self._rule}"

    def or_calls(self, calls: str, bracket: str, lead: str) -> str:
        return f"start: {calls} | answer\n{self._rule}"


def quoted(text: str) -> str:
    """``text`` as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that matches ``schema``, with bounded whitespace."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})


def python_arguments(rule: str, function: str, schema: Mapping[str, Any]) -> str:
    """The rule ``rule``: ``key=value, ...`` in the order of ``schema``; values are JSON, which Python reads alike, but True and False.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    properties = _properties(function, schema)
    if properties is None:
        return f"{rule}: ({rule}any (COMMA {rule}any)*)?\n{rule}any: KEY EQUALS {json_rule({})}\n"
    if unnamed := [key for key in properties if not key.isidentifier()]:
        raise _refusal(function, f"{unnamed[0]!r:.60}, which is no name in Python")
    items = [f"{quoted(key)} EQUALS {_python_value(schema, key)}" for key in properties]
    return _in_order(rule, items, [key in schema.get("required", ()) for key in properties], "COMMA ")


def tagged_arguments(
    rule: str, function: str, schema: Mapping[str, Any], marks: Marks, opening: Callable[[str], str], closing: str,
    around: str = "",
) -> str:  # fmt: skip
    """The rule ``rule``: values between tags in the order of ``schema``, texts without quotes, anything else as JSON.

    ``opening`` makes the grammar of what comes before a value of its key's; ``around`` is what may stand on both sides of a value and
    is no part of it.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    properties = _properties(function, schema)
    if properties is None:
        texts = f"{rule}any: {opening('KEY')} {rule}value SPACE\n"
        return f"{rule}: {rule}any*\n{texts}{marks.text_until(f'{rule}value', closing)}"
    items, values = [], ""
    for index, key in enumerate(properties):
        name = f"{rule}v{index}"
        values += _tagged_value(name, function, schema, key, marks, closing, around)
        items.append(f"{opening(quoted(key))} {name} SPACE")
    return _in_order(rule, items, [key in schema.get("required", ()) for key in properties], "") + values


def _python_value(schema: Mapping[str, Any], key: str) -> str:
    value = property_schema(schema, key)
    if types_of(schema, value) == {"boolean"} and not {"enum", "const"} & set(value):
        return '("True" | "False")'
    return json_rule({**value, **_definitions(schema)})


def _tagged_value(
    rule: str, function: str, schema: Mapping[str, Any], key: str, marks: Marks, closing: str, around: str
) -> str:
    value, end = property_schema(schema, key), marks(closing)
    given = [value["const"]] if "const" in value else value.get("enum")
    if given is not None:
        texts = " | ".join(quoted(one if isinstance(one, str) else json.dumps(one)) for one in given)
        return f"{rule}: {around} ({texts}) {around} {end}\n"
    if "string" not in types_of(schema, value):
        return f"{rule}: {around} {json_rule({**value, **_definitions(schema)})} {around} {end}\n"
    if wrong := [word for word in _OF_TEXTS if f'"{word}":' in json.dumps(value)]:
        raise _refusal(function, f"{wrong[0]} of {key!r:.60}, a text without quotes in this model's calls")
    return marks.text_until(rule, closing)


def _in_order(rule: str, items: Sequence[str], required: Sequence[bool], separator: str) -> str:
    """Items in order, of which those that are not required may be left out, with separators between them."""
    count = len(items)
    rules = [f"{rule}: {rule}s0", f'{rule}s{count}: ""', f'{rule}r{count}: ""']
    for index, (item, is_required) in enumerate(zip(items, required, strict=True)):
        following = index + 1
        rules.append(f"{rule}i{index}: {item}")
        first, next_one = f"{rule}i{index} {rule}r{following}", f"{separator}{rule}i{index} {rule}r{following}"
        rules.append(f"{rule}s{index}: {first}" + ("" if is_required else f" | {rule}s{following}"))
        rules.append(f"{rule}r{index}: {next_one}" + ("" if is_required else f" | {rule}r{following}"))
    return "\n".join(rules) + "\n"


def _properties(function: str, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments that a schema names; None if it allows any."""
    if wrong := sorted(set(schema) - _ROOT_KEYS - _ANNOTATIONS):
        raise _refusal(function, f"{wrong[0]!r:.60} of its schema")
    properties = schema.get("properties")
    if properties is None and schema.get("additionalProperties") is not False:
        return None
    named: Mapping[str, Any] = properties or {}
    if missing := [key for key in schema.get("required", ()) if key not in named]:
        raise _refusal(function, f"{missing[0]!r:.60}, which is required and not among its properties")
    return named


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in _DEFINITIONS if key in schema}


def _refusal(function: str, what: str) -> ApiError:
    return invalid(
        f"tools: {function!r:.140} is strict, but a call in this model's form cannot be held to {what}; leave strict out, or use tool_choice "
        "'required'",
        "tools",
        "unsupported_parameter",
    )
