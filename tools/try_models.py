"""Try a directory of real configs, tokenizers and chat templates: ``make try-models DIR=...``.

Below DIR, every ``config.json``, ``generation_config.json``, ``tokenizer.json`` and template (``*.jinja``, ``tokenizer_config.json``) is
read as the engine would read it. A refusal is listed with its reason; a crash, or a difference from transformers (compared where it is
installed), is a failure and gives exit status 1. No weights are needed, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phalanx.parallel.errors import PhalanxError
from phalanx.runtime.generation_config import GenerationConfig
from phalanx.runtime.models import find_model
from phalanx.runtime.text import ChatTemplate, Tokenizer

TEXTS = (
    "Hello, world", " leading space", "tab\tand\nnewline\n\n", "naïve café", "日本語のテキスト", "🦙👨‍👩‍👧‍👦", "ไทย हिन्दी", "1234567890", "a" * 40, "",
    "<s></s><|im_start|>user", "def f(x):\n    return x  # 3.14",
)  # fmt: skip
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": '<b>Now</b> & "here" é',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Köln"]}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def _call(name: str, arguments: dict[str, Any], call_id: str = "abcdefgh1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(content: Any, call_id: str = "abcdefgh1", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [_user("Hi")],
    [SYSTEM, _user(" Hi\n")],
    [_user("Hi"), _assistant("Yes?"), _user("<|im_end|>é")],
    [SYSTEM, _user("a"), _assistant(" b "), _user("日本語 🦙 \u2028"), _assistant("d"), _user("")],
    [_user("Hi"), _assistant("Hello")],
    [_user("2+2"), _assistant("<think>\nhm\n</think>\n\n4"), _user("3+3")],
    [_user(_parts("one", "two"))],
    [{"role": "system", "content": _parts("s")}, _user(_parts("a")), _assistant(_parts("b", "c")), _user("d")],
    [_user("w?"), _assistant("", _call("weather", {"city": "Köln", "days": 2})), _result('{"t": 3}', name="weather")],
    [SYSTEM, _user("w?"), _assistant(None, _call("now", {})), _result("x"), _assistant("It is x."), _user("thanks")],
    [
        _user("w?"),
        _assistant("both", _call("weather", {"city": "Köln"}), _call("now", {}, "abcdefgh2")),
        _result("1", name="weather"),
        _result(_parts("2", "3"), "abcdefgh2", name="now"),
    ],
    [_user("w?"), _assistant(None, _call("now", {}))],
    [{"role": "developer", "content": "D"}, _user("x")],
    [_user("a"), SYSTEM, _user("c")],
    [_user("a"), _user("b")],
    [_assistant("b"), _user("c")],
    [SYSTEM],
)


class DifferenceError(Exception):
    """Phalanx and transformers disagree."""


@dataclass
class Tally:
    """What came of everything that was tried."""

    counts: Counter[str] = field(default_factory=Counter)
    failed: bool = False

    def attempt(self, kind: str, what: str, action: Callable[[], object]) -> None:
        """Run ``action``, and print a line unless it succeeds."""
        try:
            action()
        except PhalanxError as error:
            self._note(kind, "refused", what, str(error))
        except Exception as error:
            self.failed = True
            self._note(kind, "FAILED", what, f"{type(error).__name__}: {error}")
        else:
            self.counts[f"{kind}: read"] += 1

    def _note(self, kind: str, outcome: str, what: str, reason: str) -> None:
        self.counts[f"{kind}: {outcome}"] += 1
        sys.stdout.write(f"{outcome} {what}: {reason[:300]}\n")


def main() -> int:
    """Try everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    root: Path = parser.parse_args().directory
    tally = Tally()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        for kind, action in _actions(path, tally.counts):
            tally.attempt(kind, name, action)
    for key, count in sorted(tally.counts.items()):
        sys.stdout.write(f"{count:6} {key}\n")
    return int(tally.failed or not tally.counts)


def _actions(path: Path, counts: Counter[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    if path.name == "generation_config.json":
        yield "generation_config", lambda: GenerationConfig.read(_json(path))
    elif path.name.endswith("config.json") and path.name != "tokenizer_config.json":
        yield "config", lambda: find_model(_json(path)).read_config(_json(path))
    elif path.name == "tokenizer.json":
        yield "tokenizer", lambda: _try_tokenizer(path.parent)
    elif path.suffix == ".jinja":
        yield "template", lambda: _try_template(path.read_text(), counts)
    elif path.name == "tokenizer_config.json" and isinstance(source := _json(path).get("chat_template"), str):
        yield "template", lambda: _try_template(source, counts)


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _try_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    reference = _reference_tokenizer(directory)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.detokenizer()
        if "".join(map(stream.push, ids)) + stream.flush() != tokenizer.decode(ids):
            raise DifferenceError(f"{text!r}: streamed and whole texts differ")
        if reference is not None and list(ids) != (expected := reference(text)["input_ids"]):
            raise DifferenceError(f"{text!r}: ids {list(ids)[:8]}... instead of {expected[:8]}...")


def _reference_tokenizer(directory: Path) -> Any:
    """The general class of transformers: what ``tokenizer.json`` and the files next to it say, without code of a family."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _try_template(source: str, counts: Counter[str]) -> None:
    template = ChatTemplate.compile(source, SPECIAL_TOKENS)
    for messages in CONVERSATIONS:
        for tools in (None, FUNCTIONS):
            for options in _render_options(messages):
                counts[f"rendering: {_compare(template, source, messages, tools, options)}"] += 1


def _render_options(messages: list[dict[str, Any]]) -> list[dict[str, bool]]:
    """With and without the beginning of an answer, and going on with the last message where that is the assistant's."""
    both = [{"add_generation_prompt": prompt} for prompt in (True, False)]
    return [*both, {"continue_final_message": True}] if messages[-1]["role"] == "assistant" else both


def _compare(
    template: ChatTemplate,
    source: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    options: dict[str, bool],
) -> str:
    """What came of it: ``equal``, ``refused by both``, or ``done`` where transformers is not installed."""
    ours: str | None
    try:
        ours = template.render(messages, tools=tools, **options)
    except PhalanxError:  # the template refuses these messages; then transformers' does, too
        ours = None
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        return "done"
    shown = [_as_shown(message, template.walks_parts) for message in messages]
    try:
        [theirs], _ = render_jinja_template([shown], tools=tools, chat_template=source, **options, **SPECIAL_TOKENS)
    except Exception:
        theirs = None
    if ours != theirs:
        raise DifferenceError(f"{messages}, {options} renders as {ours!r:.120} instead of {theirs!r:.120}")
    return "refused by both" if ours is None else "equal"


def _as_shown(message: dict[str, Any], walks_parts: bool) -> dict[str, Any]:
    """The message as vLLM hands it to a template: no content is the empty text, and parts are one text unless it walks through them."""
    content = message["content"] or ""
    if isinstance(content, list) and not walks_parts:
        content = "\n".join(part["text"] for part in content)
    return {**message, "content": content}


if __name__ == "__main__":
    sys.exit(main())
