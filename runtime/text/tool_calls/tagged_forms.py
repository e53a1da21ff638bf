# SPDX-License-Identifier: Apache-2.0
"""Forms that put each argument, or each call, between tags."""

from __future__ import annotations

import re
from abc import abstractmethod

from phalanx.runtime.text.tool_calls.arguments import of_text
from phalanx.runtime.text.tool_calls.places import MarkedReader, TaggedCallReader

__all__ = ["DeepSeekReader", "GlmReader", "QwenCoderReader"]

_END_OF_NAME = re.compile(r"[\n<]")


class TaggedReader(TaggedCallReader):
    """Calls between tags, in which each argument has tags, too; a value's type comes from the schema."""

    _key = ""

    @abstractmethod
    def _arguments(self) -> bool:
        """Read one argument, or the end of the call."""

    def _skip_unexpected(self) -> bool:
        """Drop what belongs to no argument, up to the next tag."""
        rest = self._buffer[1:]
        self._buffer = rest[rest.find("<") :] if "<" in rest else ""
        return True


class QwenCoderReader(TaggedReader):
    """``<tool_call><function=f><parameter=key>value</parameter></function></tool_call>``, values on lines of their own: Qwen3-Coder."""

    def _marked(self) -> bool:
        begun = self._buffer.lstrip()
        opening = "<function="
        if not begun.startswith(opening):
            if opening.startswith(begun):
                return False
            self._not_a_call()
            return True
        name, bracket, rest = begun.removeprefix(opening).partition(">")
        if not bracket:
            return False
        self._raw, self._buffer = self._raw + self._buffer[: -len(rest) or None], rest
        self._begin_named_call(name.strip(), rest, self._arguments)
        return True

    def _arguments(self) -> bool:
        if not self._skip_spaces():
            return False
        tag = self._tag("<parameter=", "</function>", "</tool_call>")
        if tag is None:
            return False
        if tag == "<parameter=":
            key, bracket, rest = self._buffer.removeprefix(tag).partition(">")
            if bracket:
                self._key, self._buffer, self._step = key.strip(), rest, self._value_text
            return bool(bracket)
        if not tag:
            return self._skip_unexpected()
        self._end_arguments()
        self._buffer = self._buffer.removeprefix("</function>")
        self._step = self._after_call
        return True

    def _value_text(self) -> bool:
        text, tag, rest = self._buffer.partition("</parameter>")
        if tag:
            text = text.removeprefix("\n").removesuffix("\n")
            self._add_argument(self._key, of_text(text, self._schema, self._key))
            self._buffer, self._step = rest, self._arguments
        return bool(tag)


class GlmReader(TaggedReader):
    """``<tool_call>f``, ``<arg_key>key</arg_key><arg_value>value</arg_value>`` repeated, ``</tool_call>``: GLM-4.5 and later."""

    def _marked(self) -> bool:
        begun = self._buffer.lstrip()
        end = _END_OF_NAME.search(begun)
        if end is None:
            return False
        rest = begun[end.start() :]
        self._raw, self._buffer = self._raw + self._buffer[: -len(rest)], rest
        self._begin_named_call(begun[: end.start()].strip(), rest, self._arguments)
        return True

    def _arguments(self) -> bool:
        if not self._skip_spaces():
            return False
        tag = self._tag("<arg_key>", "<arg_value>", "</tool_call>")
        if tag is None:
            return False
        if not tag:
            return self._skip_unexpected()
        if tag == "</tool_call>":
            self._end_arguments()
            self._step = self._after_call
            return True
        text, closing, rest = self._buffer.removeprefix(tag).partition(tag.replace("<", "</"))
        if not closing:
            return False
        self._buffer = rest
        if tag == "<arg_key>":
            self._key = text.strip()
        else:
            self._add_argument(self._key, of_text(text, self._schema, self._key))
        return True


class DeepSeekReader(MarkedReader):
    """Calls between special tokens, JSON arguments: DeepSeek V3 and R1 (with a fence of Markdown around them), V3.1 (without)."""

    _marker = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
    _BEGIN, _SEPARATOR, _END = (
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581sep\uff5c>",
        "<\uff5ctool\u2581call\u2581end\uff5c>",
    )
    _LAST = "<\uff5ctool\u2581calls\u2581end\uff5c>"

    def _marked(self) -> bool:
        """Read the beginning of a call, or the end of all."""
        if not self._skip_spaces():
            return False
        tag = self._tag(self._BEGIN, self._END, self._LAST, "```")
        if tag is None:
            return False
        self._buffer = self._buffer.removeprefix(tag)
        if tag == self._BEGIN:
            self._is_named, self._raw, self._step = False, self._raw + tag, self._head
        elif tag == self._LAST:
            self._raw, self._step = "", self._between
        elif not tag:
            self._is_named = False
            self._not_a_call()
        return True

    def _head(self) -> bool:
        """``function``, separator, name, fence (V3), or name, separator (V3.1); the arguments' bracket ends all that."""
        head, bracket, rest = self._buffer.partition("{")
        arguments = bracket + rest
        if self._END in head:  # without arguments
            head, _, rest = self._buffer.partition(self._END)
            arguments = "{}" + rest
        elif not bracket:
            return False
        kind, _, named = head.partition(self._SEPARATOR)
        lines = named.strip().splitlines()
        name = lines[0].strip() if lines and not lines[0].startswith("```") else kind.strip()
        self._begin_named_call(name, arguments, self._read_arguments)
        return True

    def _after_call(self) -> bool:
        self._step = self._marked
        return True
