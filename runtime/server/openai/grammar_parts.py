# SPDX-License-Identifier: Apache-2.0
"""Parts of the grammars of calls: marks, JSON, what an answer is apart from calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from phalanx.runtime.guidance import JSON_WHITESPACE
from phalanx.runtime.sampling.guides import MAX_GUIDE_CHARACTERS
from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.text import Tokenizer

__all__ = ["JsonAnswer", "Marks", "SharedRules", "Words", "json_rule", "quoted", "refusal"]


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
            f"start: PLAIN | {calls} | BLANK\nBLANK: /{blank}*/\n"
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


class SharedRules:
    """Rules of values, each once however many arguments have it: a guide has a limit."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._num_characters = 0

    def name(self, body: str) -> str:
        """Return the name of the rule with ``body``.

        Raises:
            ApiError: 400: the rules have become longer than a guide may be.
        """
        if body not in self._names:
            self.count(body)
        return self._names.setdefault(body, f"v{len(self._names)}")

    def count(self, text: str) -> None:
        """Count other parts of the grammar, so that one that cannot be used is not built to its end.

        Raises:
            ApiError: as `name`.
        """
        self._num_characters += len(text)
        if self._num_characters > MAX_GUIDE_CHARACTERS:
            raise invalid(
                f"tools: the strict functions make a grammar of more than {MAX_GUIDE_CHARACTERS} characters; give fewer of them, or shorten "
                "their schemas",
                "tools",
            )

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


def quoted(text: str) -> str:
    """``text`` as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that matches ``schema``, with bounded whitespace."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})


def refusal(function: str, what: str) -> ApiError:
    """Return the error of a strict function of which a form cannot be held to ``what``."""
    return invalid(
        f"tools: {function!r:.140} is strict, but a call in this model's form cannot be held to {what}; leave strict out, or use tool_choice "
        "'required'",
        "tools",
        "unsupported_parameter",
    )
