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
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "<|im_end|>é"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
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
        for kind, action in _actions(path):
            tally.attempt(kind, name, action)
    for key, count in sorted(tally.counts.items()):
        sys.stdout.write(f"{count:6} {key}\n")
    return int(tally.failed or not tally.counts)


def _actions(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    if path.name == "generation_config.json":
        yield "generation_config", lambda: GenerationConfig.read(_json(path))
    elif path.name.endswith("config.json") and path.name != "tokenizer_config.json":
        yield "config", lambda: find_model(_json(path)).read_config(_json(path))
    elif path.name == "tokenizer.json":
        yield "tokenizer", lambda: _try_tokenizer(path.parent)
    elif path.suffix == ".jinja":
        yield "template", lambda: _try_template(path.read_text())
    elif path.name == "tokenizer_config.json" and isinstance(source := _json(path).get("chat_template"), str):
        yield "template", lambda: _try_template(source)


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


def _try_template(source: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = ChatTemplate.compile(source, tokens)
    for messages in CONVERSATIONS:
        if not template.walks_parts and isinstance(messages[0]["content"], list):
            continue  # such a template gets one text, where transformers would print a Python list
        for prompt in (True, False):
            _compare(template, source, messages, prompt, tokens)


def _compare(
    template: ChatTemplate, source: str, messages: list[dict[str, Any]], prompt: bool, tokens: dict[str, str]
) -> None:
    ours: str | None
    try:
        ours = template.render(messages, add_generation_prompt=prompt)
    except PhalanxError:  # the template refuses these messages; then transformers' does, too
        ours = None
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        return
    try:
        [theirs], _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **tokens)
    except Exception:
        theirs = None
    if ours != theirs:
        raise DifferenceError(f"{messages[-1]['content']!r} renders as {ours!r:.120} instead of {theirs!r:.120}")


if __name__ == "__main__":
    sys.exit(main())
