# SPDX-License-Identifier: Apache-2.0
"""The forms in which models write tool calls, under the names that vLLM's ``--tool-call-parser`` has for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from phalanx.runtime.text.tool_calls.places import ListReader, MarkedReader, TaggedCallReader, WholeReader
from phalanx.runtime.text.tool_calls.pythonic import PythonicReader
from phalanx.runtime.text.tool_calls.reader import CallPiece, ToolCallReader
from phalanx.runtime.text.tool_calls.tagged_forms import DeepSeekReader, GlmReader, QwenCoderReader

__all__ = ["TOOL_CALL_FORMS", "ArgumentsReader", "CallListReader", "tool_call_reader"]


class HermesReader(TaggedCallReader):
    """``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``, repeated: Hermes 2 Pro, Qwen 2.5, Qwen 3."""


class LlamaReader(WholeReader):
    """``{"name": "f", "parameters": {...}}`` as the whole answer, several with ``;`` between them: Llama 3.1 to 3.3.

    ``<|python_tag|>`` may come first. There is no other mark: without it the first object must name one of the functions.
    """

    _lead, _opening = "<|python_tag|>", "{"

    def _opened(self) -> bool:
        return self._read_call()

    def _is_callable(self, name: str) -> bool:
        return name in self._names or self._is_marked

    def _after_call(self) -> bool:
        if not self._skip_spaces():
            return False
        self._is_named = False
        separator = self._buffer[0] if self._buffer[0] in ";," else ""
        rest = self._buffer[len(separator) :].lstrip()
        if not rest:
            self._is_named = True  # a separator at the end is no text
            return False
        if rest.startswith("{"):
            self._raw, self._buffer = self._buffer[: len(self._buffer) - len(rest)], rest
            self._step = self._read_call
        else:
            self._step = self._plain
        return True


class MistralReader(MarkedReader):
    """``[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]``, or from tokenizer version 11 on ``[TOOL_CALLS]f[ARGS]{...}``, repeated."""

    _marker = "[TOOL_CALLS]"
    _is_list = False

    def _marked(self) -> bool:
        """A list of calls, or a function's name."""
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        self._raw += self._buffer[: len(self._buffer) - len(stripped)]
        self._buffer = stripped
        if stripped.startswith("["):
            self._raw, self._buffer, self._step = self._raw + "[", stripped[1:], self._read_call
            self._is_list = True
        else:
            self._step = self._named_head
        return True

    def _named_head(self) -> bool:
        """``f``, ``[CALL_ID]...`` in some versions, ``[ARGS]``; the arguments' bracket ends all that."""
        head, bracket, rest = self._buffer.partition("{")
        if not bracket:
            return False
        name = head.partition("[CALL_ID]")[0].partition("[ARGS]")[0].strip()
        self._is_list = False
        self._begin_named_call(name, bracket + rest, self._read_arguments)
        return True

    def _after_call(self) -> bool:
        if not self._is_list:
            self._step = self._between
            return True
        if not self._skip_spaces():
            return False
        mark, self._buffer = self._buffer[0], self._buffer[1:]
        if mark == ",":
            self._is_named, self._raw, self._step = False, mark, self._read_call
        else:
            self._buffer = self._buffer if mark == "]" else mark + self._buffer
            self._step = self._between
        return True


TOOL_CALL_FORMS: Mapping[str, type[ToolCallReader]] = MappingProxyType(
    {
        "hermes": HermesReader,
        "llama3_json": LlamaReader,
        "mistral": MistralReader,
        "pythonic": PythonicReader,
        "qwen3_coder": QwenCoderReader,
        "glm45": GlmReader,
        "deepseek_v3": DeepSeekReader,
    }
)


def tool_call_reader(
    form: str, names: Collection[str], *, parallel: bool = True, schemas: Mapping[str, Any] | None = None
) -> ToolCallReader:
    """Return a reader of one answer's calls in ``form``, a key of `TOOL_CALL_FORMS`; see `ToolCallReader`."""
    return TOOL_CALL_FORMS[form](names, parallel=parallel, schemas=schemas)


class CallListReader(ListReader):
    """``[{"name": "f", "parameters": {...}}, ...]`` as the whole answer, as a grammar enforces it.

    The beginning of a call that the length limit cut off before its name is no text.
    """

    def finish(self) -> list[CallPiece]:
        self._raw = self._buffer = ""
        return super().finish()


class ArgumentsReader(ToolCallReader):
    """The arguments of one function as the whole answer, as a grammar enforces it."""

    def _first_step(self) -> Callable[[], bool]:
        return self._arguments

    def _arguments(self) -> bool:
        if not self._buffer:
            return False
        if not self._is_named:
            (name,) = self._names
            self._begin_call(name)
        self._add_arguments(self._buffer)
        self._buffer = ""
        return False

    def _after_call(self) -> bool:
        return False
