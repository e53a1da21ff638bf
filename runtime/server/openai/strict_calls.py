# SPDX-License-Identifier: Apache-2.0
"""Grammars of answers that may hold calls in a model's own form: free text or JSON, and from a call's mark on only what matches the schemas.

They are llguidance's Lark grammars (https://github.com/guidance-ai/llguidance, docs/syntax.md, "Tool calling" and "Special tokens").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from phalanx.runtime.server.errors import invalid
from phalanx.runtime.server.openai.forced_calls import call_schema
from phalanx.runtime.server.openai.grammar_arguments import python_arguments, tagged_arguments
from phalanx.runtime.server.openai.grammar_parts import JsonAnswer, Marks, Words, json_rule, quoted
from phalanx.runtime.server.openai.grammar_values import PythonValues, TaggedValues
from phalanx.runtime.text import Tokenizer

__all__ = ["strict_grammar"]

Functions = Sequence[tuple[str, dict[str, Any]]]
"""Names and schemas of arguments."""

Rest = Words | JsonAnswer
"""What an answer is apart from calls."""

_SHARED_RULES = r"""
TEXT: /(.|\n)*/
SPACE: /[ \n]{0,64}/
COMMA: /[ \n]{0,64},[ \n]{0,64}/
"""

# Texts are never next to each other: two quotes that close one and a third would begin a long text.
_PYTHON_RULES = r"""
EQUALS: /[ \n]{0,64}=[ \n]{0,64}/
NAME: /[^\W\d]\w{0,64}/
any: other* (text (other+ text)* other*)?
other: /[^()\[\]{}"']+/ | "(" any ")" | "[" any "]" | "{" any "}"
text: /"([^"\\]|\\(.|\n))*"/ | /'([^'\\]|\\(.|\n))*'/ | /"{3}("{0,2}([^"\\]|\\(.|\n)))*"{3}/ | /'{3}('{0,2}([^'\\]|\\(.|\n)))*'{3}/
"""


def strict_grammar(
    form: str, functions: Functions, tokenizer: Tokenizer, answer: Mapping[str, Any] | None = None
) -> str:
    """Return the grammar of an answer of a model that writes calls in ``form``, a key of `TOOL_CALL_FORMS`.

    What is no call is free text, or JSON that matches the schema ``answer`` and comes without calls.

    Raises:
        ApiError: 400: a schema says more than the form can be held to, or a name is one that the form cannot write.
    """
    rest = Words() if answer is None else JsonAnswer(answer)
    try:
        return _GRAMMARS[form](functions, Marks(tokenizer), rest) + _SHARED_RULES
    except RecursionError:
        raise invalid("tools: a schema of a strict function is nested too deeply; flatten it", "tools") from None


def _objects(functions: Functions, arguments: str) -> dict[str, Any]:
    """The schema of one call as an object with a name and ``arguments``."""
    shared: dict[str, dict[str, Any]] = {}
    calls = [call_schema(name, dict(schema), shared, arguments) for name, schema in functions]
    return {"anyOf": calls, **shared}


def _hermes(functions: Functions, marks: Marks, rest: Rest) -> str:
    body, end = json_rule(_objects(functions, "arguments")), marks("</tool_call>")
    return rest.with_calls(marks, "<tool_call>", f"SPACE {body} SPACE {end}")


def _mistral(functions: Functions, marks: Marks, rest: Rest) -> str:
    """A list of calls; or, where the tokenizer has a mark for that, names and arguments."""
    if not marks.knows("[ARGS]"):
        objects = _objects(functions, "arguments")
        shared = {key: value for key, value in objects.items() if key != "anyOf"}
        calls = {"type": "array", "items": {"anyOf": objects["anyOf"]}, "minItems": 1, **shared}
        return rest.with_calls(marks, "[TOOL_CALLS]", f"SPACE {json_rule(calls)}")
    _check_names(functions, "[{")
    number = f"({marks('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/)?" if marks.knows("[CALL_ID]") else ""
    calls_by_name = [f"{quoted(name)} {number} {marks('[ARGS]')} {json_rule(schema)}" for name, schema in functions]
    return rest.with_calls(marks, "[TOOL_CALLS]", "call") + f"call: {' | '.join(calls_by_name)}\n"


def _deepseek(functions: Functions, marks: Marks, rest: Rest) -> str:
    """The kind, a name and fenced arguments (V3, R1), or a name and arguments (V3.1)."""
    _check_names(functions, "`{")
    first, last, begin, separator, end = (
        f"<\uff5ctool\u2581{name}\uff5c>"
        for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "sep", "call\u2581end")
    )
    between, calls, rules = marks(separator), [], ""
    for index, (name, schema) in enumerate(functions):
        rules += f"a{index}: {json_rule(schema)}\n"
        calls.append(f'"function" {between} {quoted(name)} "\\n```json\\n" a{index} "\\n```"')
        calls.append(f"{quoted(name)} {between} a{index}")
    body = f"(SPACE {marks(begin)} call {marks(end)})+ SPACE {marks(last)}"
    return rest.with_calls(marks, first, body) + f"call: {' | '.join(calls)}\n{rules}"


def _llama(functions: Functions, marks: Marks, rest: Rest) -> str:
    """An answer that begins with a bracket is calls."""
    start = rest.or_calls("call (SEMICOLON call)*", "{", "python_tag")
    call = json_rule(_objects(functions, "parameters"))
    return f"{start}call: {call}\nSEMICOLON: /[ \\n]{{0,64}};[ \\n]{{0,64}}/\n"


def _pythonic(functions: Functions, marks: Marks, rest: Rest) -> str:
    """An answer that begins with a bracket is a list of calls."""
    _check_names(functions, "(")
    values = PythonValues()
    rules = [
        f'f{index}: {quoted(name)} SPACE "(" SPACE a{index} SPACE ")"\n'
        + python_arguments(f"a{index}", name, schema, values)
        for index, (name, schema) in enumerate(functions)
    ]
    start = rest.or_calls('"[" SPACE call (COMMA call)* SPACE "]"', "[", "python_start")
    return f"{start}call: {_any_of('f', functions)}\n{''.join(rules)}{values}{_PYTHON_RULES}"


def _qwen_coder(functions: Functions, marks: Marks, rest: Rest) -> str:
    _check_names(functions, ">")
    values = TaggedValues(marks, "</parameter>", "\n")
    rules = [
        f"f{index}: {quoted(f'<function={name}>')} SPACE a{index} {quoted('</function>')}\n"
        + tagged_arguments(f"a{index}", name, schema, values, _parameter, ">")
        for index, (name, schema) in enumerate(functions)
    ]
    body = f"SPACE ({_any_of('f', functions)}) SPACE {marks('</tool_call>')}"
    return rest.with_calls(marks, "<tool_call>", body) + "".join(rules) + f"{values}KEY: /[^>]+/\n"


def _parameter(key: str | None) -> str:
    return f'"<parameter=" {key or "KEY"} ">"'


def _glm(functions: Functions, marks: Marks, rest: Rest) -> str:
    _check_names(functions, "<")
    values, end = TaggedValues(marks, "</arg_value>"), "</arg_key>"

    def key_of(key: str | None) -> str:
        return f"{marks('<arg_key>')} {'key' if key is None else f'{key} {marks(end)}'} SPACE {marks('<arg_value>')}"

    rules = [
        f'f{index}: {quoted(name)} "\\n" SPACE a{index}\n'
        + tagged_arguments(f"a{index}", name, schema, values, key_of, end)
        for index, (name, schema) in enumerate(functions)
    ]
    body = f"({_any_of('f', functions)}) {marks('</tool_call>')}"
    return rest.with_calls(marks, "<tool_call>", body) + "".join(rules) + str(values) + marks.text_until("key", end)


def _check_names(functions: Functions, ends: str) -> None:
    """Refuse names that a reader of the form would cut: a character of ``ends`` ends a name."""
    for name, _ in functions:
        if found := set(ends) & set(name):
            raise invalid(
                f"tools: {name!r:.140} cannot be called in this model's form of calls, where {min(found)!r} ends a name; rename it",
                "tools",
            )


def _any_of(rule: str, functions: Functions) -> str:
    return " | ".join(f"{rule}{index}" for index in range(len(functions)))


_GRAMMARS: Mapping[str, Callable[[Functions, Marks, Rest], str]] = MappingProxyType(
    {
        "hermes": _hermes,
        "llama3_json": _llama,
        "mistral": _mistral,
        "pythonic": _pythonic,
        "qwen3_coder": _qwen_coder,
        "glm45": _glm,
        "deepseek_v3": _deepseek,
    }
)
