# SPDX-License-Identifier: Apache-2.0
"""Guides for answers that must be calls, as JSON: one function's arguments, or a list."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from phalanx.runtime.sampling.guides import MAX_GUIDE_CHARACTERS
from phalanx.runtime.server.errors import invalid
from phalanx.runtime.text.tool_calls import ANNOTATIONS

__all__ = ["arguments_schema", "call_schema", "calls_schema", "check_sizes"]

_SHARED = ("$defs", "definitions")
_REFERENCE = re.compile(r"^#/(\$defs|definitions)/")
_FROM_TOP = re.compile(r"^#(?=$|/(?!(\$defs|definitions)/))")
_OF_SCHEMAS = frozenset({*_SHARED, "properties", "patternProperties", "dependentSchemas"})
_OF_VALUES = frozenset({"enum", "const", "required", "type"})


def check_sizes(schemas: Iterable[Mapping[str, Any] | None]) -> None:
    """Refuse schemas that no guide could hold before any work is done for them, less their words for the model.

    Raises:
        ApiError: 400: together they have more than four times as many characters as a guide may have.
    """
    left = 4 * MAX_GUIDE_CHARACTERS
    waiting: list[tuple[str, Any]] = [("", schema) for schema in schemas]
    while waiting:
        key, one = waiting.pop()
        left -= len(one) if isinstance(one, str | list | dict) else 1
        if left < 0:
            raise invalid(
                f"tools: the schemas have more than {4 * MAX_GUIDE_CHARACTERS} characters without descriptions, and calls could not be held to "
                "them; shorten them",
                "tools",
            )
        if isinstance(one, list):
            waiting += [("", item) for item in one]
        elif isinstance(one, dict):
            left -= sum(map(len, one))
            by_name = key in _OF_SCHEMAS
            waiting += [
                ("" if by_name else name, item) for name, item in one.items() if by_name or name not in ANNOTATIONS
            ]


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a function's arguments, less its words for the model; a function without parameters takes an empty object.

    Its references lead to definitions, so that parts of it can stand in other schemas.

    Raises:
        ApiError: 400: it is nested too deeply.
    """
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        return _with_root(
            {key: _without_words(key, value) for key, value in parameters.items() if key not in ANNOTATIONS}
        )
    except RecursionError:
        raise invalid("tools: a schema is nested too deeply; flatten it", "tools") from None


def _without_words(key: str, value: Any) -> Any:
    """The value of a keyword without the annotations of the schemas in it: they allow nothing, and a guide has a limit."""
    if key in _OF_VALUES:
        return value
    if key in _OF_SCHEMAS and isinstance(value, dict):
        return {name: _without_words("", schema) for name, schema in value.items()}
    if isinstance(value, list):
        return [_without_words("", item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_words(name, item) for name, item in value.items() if name not in ANNOTATIONS}


def _with_root(schema: dict[str, Any]) -> dict[str, Any]:
    """The same with what ``#`` and ``#/properties/...`` lead to, its top, as a definition."""
    definitions = schema.get("$defs", {})
    if not isinstance(definitions, dict):
        return schema
    name = next(name for name in map("root{}".format, itertools.count()) if name not in definitions)
    renamed = _referring(schema, lambda target: _FROM_TOP.sub(f"#/$defs/{name}", target))
    if renamed == schema:
        return schema
    root = {key: value for key, value in renamed.items() if key not in _SHARED}
    return {**renamed, "$defs": {**renamed.get("$defs", {}), name: root}}


def calls_schema(functions: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of at least one call, ``{"name", "parameters"}``; at most one unless ``parallel``.

    Raises:
        ApiError: 400: ``$defs``, to which references lead from the top, is not an object; the schemas are too large.
    """
    check_sizes(parameters for _, parameters in functions)
    shared: dict[str, dict[str, Any]] = {}
    calls = [call_schema(name, arguments_schema(parameters), shared, "parameters") for name, parameters in functions]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **shared}


def call_schema(
    name: str, parameters: dict[str, Any], shared: dict[str, dict[str, Any]], arguments: str
) -> dict[str, Any]:
    """Return the schema of one call, an object with a name and ``arguments``; definitions go to ``shared``.

    Those of a function that defines a name differently than one before it have names that no other has.

    Raises:
        ApiError: as `calls_schema`.
    """
    own = {key: parameters.pop(key) for key in _SHARED if key in parameters}
    for key, definitions in own.items():
        if not isinstance(definitions, dict):
            raise invalid(f"tools: {key} of {name} is not an object of schemas; correct it", "tools")
    if any(shared.get(key, {}).get(defined, schema) != schema for key, defined, schema in _defined(own)):
        prefix = _new_prefix(own, shared)

        def renamed(target: str) -> str:
            return _REFERENCE.sub(rf"\g<0>{prefix}", target)

        parameters, own = _referring(parameters, renamed), {
            key: {prefix + defined: _referring(schema, renamed) for defined, schema in definitions.items()}
            for key, definitions in own.items()
        }  # fmt: skip
    for key, defined, schema in _defined(own):
        shared.setdefault(key, {})[defined] = schema
    return {
        "type": "object",
        "properties": {"name": {"const": name}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def _defined(own: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Keyword, name and schema of every definition."""
    return ((key, defined, schema) for key, definitions in own.items() for defined, schema in definitions.items())


def _new_prefix(own: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Mapping[str, Any]]) -> str:
    """A prefix with which no definition has a name that is taken."""
    prefixes = (f"{number}." for number in itertools.count(sum(map(len, shared.values()))))
    return next(
        prefix for prefix in prefixes if all(prefix + defined not in shared.get(key, ()) for key, defined, _ in _defined(own))
    )  # fmt: skip


def _referring(value: Any, change: Callable[[str], str], *, is_by_name: bool = False) -> Any:
    """A schema with all its references changed; ``is_by_name``: schemas by name, not keywords."""
    if isinstance(value, list):
        return [_referring(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    if is_by_name:
        return {name: _referring(schema, change) for name, schema in value.items()}
    changed = {
        key: item if key in _OF_VALUES else _referring(item, change, is_by_name=key in _OF_SCHEMAS)
        for key, item in value.items()
    }
    if isinstance(target := value.get("$ref"), str):
        changed["$ref"] = change(target)
    return changed
