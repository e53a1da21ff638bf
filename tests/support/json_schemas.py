"""Random JSON schemas of common shapes, small enough that an answer of some hundred tokens completes."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["random_schema"]

_NAMES = ("id", "name", "age", "tags", "price", "kind", "items", "ok", "note", "at", "x", "y")
_WORDS = ("red", "green", "blue", "a b", "naïve", 'say "hi"', "1", "")


def random_schema(seed: int) -> dict[str, Any]:
    """An object with scalars, choices, arrays, objects, alternatives and references, of up to three levels."""
    rng = random.Random(seed)
    schema = _object(rng, 2)
    if rng.random() < 0.2:
        schema["$defs"] = {"shared": _object(rng, 0)}
        name = rng.choice(_NAMES)
        schema["properties"][name] = {"$ref": "#/$defs/shared"}
        schema["required"] = sorted({*schema["required"], name})
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    scalars = (_integer, _number, _string, _boolean, _null, _enum, _const, _pattern, _format)
    nested = (_object, _array, _any_of)
    if depth > 0 and rng.random() < 0.4:
        return rng.choice(nested)(rng, depth - 1)
    return rng.choice(scalars)(rng)


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth) for _ in range(rng.randint(2, 3))]}


def _integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}


def _number(rng: random.Random) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": rng.choice((1, 2.5, 100))}


def _string(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _pattern(rng: random.Random) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": rng.choice(("^[a-z]{2,5}$", "^[A-Z][0-9]{3}$", "^(yes|no)$", "^#[0-9a-f]{6}$")),
    }


def _format(rng: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(("date", "time", "ipv4", "uuid"))}


def _boolean(_: random.Random) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(_: random.Random) -> dict[str, Any]:
    return {"type": "null"}


def _enum(rng: random.Random) -> dict[str, Any]:
    return {"enum": rng.sample((*_WORDS, 1, 2.5, None, True), rng.randint(1, 4))}


def _const(rng: random.Random) -> dict[str, Any]:
    return {"const": rng.choice((*_WORDS, 0, None, False))}
