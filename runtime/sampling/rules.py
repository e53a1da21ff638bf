# SPDX-License-Identifier: Apache-2.0
"""Types and limits of request fields: each rule turns a value into one of its type, or refuses it by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from phalanx.parallel.errors import RequestError

__all__ = [
    "MAX_INT32",
    "EarlyStopping",
    "Flag",
    "Real",
    "Rule",
    "Texts",
    "TokenIds",
    "TokenLists",
    "TokenNumbers",
    "Whole",
]

MAX_INT32 = 2**31 - 1

SMALLEST_FLOAT32 = 2.0**-126
"""The smallest normal one. Devices may flush what is smaller to zero, so everything smaller is zero everywhere."""


class Rule(Protocol):
    """What a field may hold."""

    def check(self, name: str, value: Any) -> Any:
        """``value`` as the field's own type.

        Raises:
            RequestError: it is of another type or out of range; ``name`` is what the message calls the field.
        """
        ...

    def schema(self) -> dict[str, Any]:
        """Return what `check` lets pass as a JSON schema."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from ``low`` to ``high``. A float without a fraction counts as one, as in JSON; a boolean does not."""

    low: int
    high: int = 2**63 - 1

    def schema(self) -> dict[str, Any]:
        return {"type": ["integer", "null"], "minimum": self.low, "maximum": self.high}

    def check(self, name: str, value: Any) -> int:
        number = _whole(value)
        if number is None:
            raise RequestError(f"{name}={shown(value)} is not a whole number", name)
        if not self.low <= number <= self.high:
            limit = f"at least {self.low}" if number < self.low else f"at most {self.high}"
            raise RequestError(f"{name}={shown(value)} is out of range; use {limit}", name)
        return number


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number from ``low`` to ``high`` that a float32 can hold; one that is too small for it becomes 0."""

    low: float
    high: float

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "null"], "minimum": self.low, "maximum": self.high}

    def check(self, name: str, value: Any) -> float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        try:
            number = float(value) if is_number else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RequestError(f"{name}={shown(value)} is not a finite number", name)
        if not self.low <= number <= self.high:
            raise RequestError(
                f"{name}={shown(value)} is out of range; use a value between {self.low} and {self.high}", name
            )
        return number if abs(number) >= SMALLEST_FLOAT32 else 0.0


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false, and nothing that merely counts as one of them."""

    def schema(self) -> dict[str, Any]:
        return {"type": ["boolean", "null"]}

    def check(self, name: str, value: Any) -> bool:
        if type(value).__name__ not in ("bool", "bool_"):
            raise RequestError(f"{name}={shown(value)} is not a boolean; use true or false", name)
        return bool(value)


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """True, False or ``never``, as in ``transformers``; 1 and 0 mean true and false."""

    def schema(self) -> dict[str, Any]:
        return {"enum": [True, False, "never", None]}

    def check(self, name: str, value: Any) -> bool | Literal["never"]:
        if isinstance(value, bool) or (isinstance(value, str) and value == "never"):
            return value  # type: ignore[return-value]
        if (number := _whole(value)) in (0, 1):
            return bool(number)
        raise RequestError(f'{name}={shown(value)} is not supported; use true, false or "never"', name)


@dataclass(frozen=True, slots=True)
class Texts:
    """One text or a list of them, without empty ones."""

    most: int
    most_characters: int

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1, "maxLength": self.most_characters}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": self.most}, {"type": "null"}]}

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            raise RequestError(f"{name}={shown(value)} is neither a string nor a list of strings", name)
        if len(texts) > self.most:
            raise RequestError(f"{name} holds {len(texts)} texts; use at most {self.most}", name)
        return tuple(self._check_one(name, text) for text in texts)

    def _check_one(self, name: str, text: Any) -> str:
        if not isinstance(text, str):
            raise RequestError(f"{name} holds {shown(text)}, which is not a string", name)
        if not text:
            raise RequestError(f"{name} holds an empty string, which would match at once; leave it out", name)
        if len(text) > self.most_characters:
            raise RequestError(
                f"{name} holds a string of {len(text)} characters; use at most {self.most_characters}", name
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(f"{name} holds {shown(text)}, which is not valid Unicode (a lone surrogate)", name)
        return str(text)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of ``least`` to ``most`` token ids; the scheduler knows the vocabulary and checks them against it."""

    most: int
    least: int = 0

    def schema(self) -> dict[str, Any]:
        token = {"type": "integer", "minimum": 0, "maximum": MAX_INT32}
        return {"type": ["array", "null"], "items": token, "maxItems": self.most}

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        listed = value.tolist() if callable(getattr(value, "tolist", None)) else value  # arrays of any library
        if not isinstance(listed, (list, tuple)):
            raise RequestError(f"{name}={shown(value)} is not a list of token ids", name)
        if len(listed) > self.most:
            raise RequestError(f"{name} holds {len(listed)} tokens; use at most {self.most}", name)
        if len(listed) < self.least:
            raise RequestError(f"{name} holds {len(listed)} tokens; use at least {self.least}, or leave it out", name)
        for token in listed:
            number = _whole(token)
            if number is None or not 0 <= number <= MAX_INT32:
                raise RequestError(
                    f"{name} holds {shown(token)}, which is not a valid token id; use 0 to below the vocabulary size",
                    name,
                )
        return tuple(map(int, listed))


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Lists of token ids, none of them empty, with ``most_tokens`` in all."""

    most_tokens: int

    def schema(self) -> dict[str, Any]:
        tokens = TokenIds(self.most_tokens).schema() | {"type": "array", "minItems": 1}
        return {"type": ["array", "null"], "items": tokens, "maxItems": self.most_tokens}

    def check(self, name: str, value: Any) -> tuple[tuple[int, ...], ...]:
        if not isinstance(value, (list, tuple)):
            raise RequestError(f"{name}={shown(value)} is not a list of lists of token ids", name)
        if len(value) > self.most_tokens:
            raise RequestError(f"{name} holds {len(value)} lists; use at most {self.most_tokens}", name)
        lists = tuple(TokenIds(self.most_tokens).check(name, tokens) for tokens in value)
        if () in lists:
            raise RequestError(f"{name} holds an empty list, which would match at once; leave it out", name)
        if (total := sum(map(len, lists))) > self.most_tokens:
            raise RequestError(f"{name} holds {total} tokens; use at most {self.most_tokens}", name)
        return lists


@dataclass(frozen=True, slots=True)
class TokenNumbers:
    """A number for each of some tokens: a mapping, whose keys may be texts as in JSON, or pairs; becomes pairs."""

    most: int
    number: Real

    def schema(self) -> dict[str, Any]:
        return {
            "type": ["object", "null"],
            "additionalProperties": self.number.schema() | {"type": "number"},
            "propertyNames": {"pattern": "^[0-9]+$"},
            "maxProperties": self.most,
        }

    def check(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, (list, tuple)) or any(
            not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs
        ):
            raise RequestError(f"{name}={shown(value)} does not map token ids to numbers", name)
        if len(pairs) > self.most:
            raise RequestError(f"{name} holds {len(pairs)} tokens; use at most {self.most}", name)
        keys = [int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key for key, _ in pairs]
        tokens = TokenIds(self.most).check(name, keys)
        numbers = [self.number.check(name, number) for _, number in pairs]
        return tuple(zip(tokens, numbers, strict=True))


def shown(value: Any) -> str:
    """A value in a message: in full where it is short."""
    try:
        text = repr(value)
    except ValueError:  # a number with more digits than Python prints
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(value: Any) -> int | None:
    if type(value).__name__ in ("bool", "bool_"):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    return int(number) if number.is_integer() else None
