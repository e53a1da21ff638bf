# SPDX-License-Identifier: Apache-2.0
"""Rules of arguments that stand one by one in a call, in Python's notation or between tags, made from a function's schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.runtime.server.openai.grammar_choices import DEFINITIONS
from phalanx.runtime.server.openai.grammar_parts import quoted, refusal
from phalanx.runtime.server.openai.grammar_values import PythonValues, TaggedValues, Values
from phalanx.runtime.text.tool_calls import ANNOTATIONS

__all__ = ["python_arguments", "tagged_arguments"]

_ROOT_KEYS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$schema",
    "$id",
    "strict",
    *DEFINITIONS,
    *ANNOTATIONS,
}


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What the schema of a function says of its arguments as a whole.

    Attributes:
        names: of the arguments; None = any.
        are_any: nothing is said of arguments without a name.
    """

    names: Sequence[str] | None
    required: frozenset[str]
    are_any: bool


def python_arguments(rule: str, function: str, schema: Mapping[str, Any], values: PythonValues) -> str:
    """The rule ``rule``: ``key=value, ...`` in the order of ``schema``; if that allows anything, whatever Python could read.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    arguments = _arguments(function, schema)
    if arguments.names is None:
        if arguments.are_any:
            return f"{rule}: any\n"
        item = f"NAME EQUALS {values.of(function, schema, '')}"
        return f"{rule}: ({item} (COMMA {item})*)?\n"
    if unnamed := [key for key in arguments.names if not key.isidentifier()]:
        raise refusal(function, f"{unnamed[0]!r:.60}, which is no name in Python")
    items = (f"{quoted(key)} EQUALS {values.of(function, schema, key)}" for key in arguments.names)
    return _in_order(rule, items, arguments, "COMMA ", values)


def tagged_arguments(
    rule: str, function: str, schema: Mapping[str, Any], values: TaggedValues, opening: Callable[[str | None], str], end: str
) -> str:  # fmt: skip
    """The rule ``rule``: values between tags in the order of ``schema``, texts without quotes, anything else as JSON.

    ``opening`` makes the grammar of what comes before a value of its key's, None for any; keys end with ``end``.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    arguments = _arguments(function, schema)
    if arguments.names is None:
        value = values.text if arguments.are_any else values.of(function, schema, "")
        return f"{rule}: ({opening(None)} {value} SPACE)*\n"
    if unreadable := [key for key in arguments.names if end in key or key != key.strip()]:
        raise refusal(function, f"{unreadable[0]!r:.60}, which is no name between its tags")
    items = (f"{opening(quoted(key))} {values.of(function, schema, key)} SPACE" for key in arguments.names)
    return _in_order(rule, items, arguments, "", values)


def _in_order(rule: str, items: Iterator[str], arguments: _Arguments, separator: str, values: Values) -> str:
    """Items in order, of which those that are not required may be left out, with separators between them."""
    names = arguments.names or ()
    if names and arguments.required.issuperset(names):
        return f"{rule}: {f' {separator}'.join(_counted(items, values))}\n"
    count = len(names)
    rules = [f"{rule}: {rule}s0", f'{rule}s{count}: ""', f'{rule}r{count}: ""']
    for index, (item, name) in enumerate(zip(_counted(items, values), names, strict=True)):
        following, is_required = index + 1, name in arguments.required
        rules.append(f"{rule}i{index}: {item}")
        first, next_one = f"{rule}i{index} {rule}r{following}", f"{separator}{rule}i{index} {rule}r{following}"
        rules.append(f"{rule}s{index}: {first}" + ("" if is_required else f" | {rule}s{following}"))
        rules.append(f"{rule}r{index}: {next_one}" + ("" if is_required else f" | {rule}r{following}"))
    return "\n".join(rules) + "\n"


def _counted(items: Iterator[str], values: Values) -> Iterator[str]:
    for item in items:
        values.shared.count(item)
        yield item


def _arguments(function: str, schema: Mapping[str, Any]) -> _Arguments:
    """Read the top of a schema.

    Raises:
        ApiError: 400: it is not one of an object, or says more than names, what is required and the schemas of values.
    """
    kind, properties, required, rest = (
        schema.get(key, default) for key, default in (("type", "object"), ("properties", None), ("required", []), ("additionalProperties", True))
    )  # fmt: skip
    names = list(properties) if isinstance(properties, Mapping) else None
    wrong = {
        f"{min(set(schema) - _ROOT_KEYS, default='')!r:.60} of its schema": not set(schema) <= _ROOT_KEYS,
        f"the type {kind!r:.60}, which is not object": kind != "object",
        "properties that are not schemas by name": not _are_schemas(properties),
        "required, which is not a list of names": not isinstance(required, list)
        or not all(isinstance(key, str) for key in required),
        "additionalProperties, which is not a schema": not isinstance(rest, Mapping | bool),
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise refusal(function, found[0])
    if missing := [key for key in required if key not in (names or ())]:
        raise refusal(function, f"{missing[0]!r:.60}, which is required and not among its properties")
    if names is None and rest is False:
        names = []
    return _Arguments(names, frozenset(required), not rest or rest is True)


def _are_schemas(properties: Any) -> bool:
    return properties is None or (
        isinstance(properties, Mapping) and all(isinstance(one, Mapping) or one is True for one in properties.values())
    )
