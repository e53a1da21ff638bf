# SPDX-License-Identifier: Apache-2.0
"""Questions and answers made from the docstrings and functions of the training documents.

They teach the demo model its chat template: to answer what was asked, and to stop.
"""

import ast
import hashlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from demo_corpus import TOPICS_PATH, Document, parse_quietly
from demo_small_talk import SMALL_TALK, SMALL_TALK_COPIES

BOS, EOS, SYSTEM, USER, ASSISTANT = "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"

# The role markers are single tokens that text cannot contain, so a turn needs no other delimiter.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' ~ message['role'] ~ ' is unknown; use system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_ANSWER_CHARACTERS = 400
MAX_CODE_LINES = 24
FORMS_PER_FACT = 3
SYSTEM_PROMPT = "You are a helpful assistant for the Python standard library."

# Folders whose functions nobody would ask a demo about; they are trained on as text all the same.
UNASKED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "turtledemo", "tkinter"})

# Modules that users know by another name than that of the file that holds the Python source.
PUBLIC_NAMES = {"posixpath": "os.path", "_pydecimal": "decimal", "_pydatetime": "datetime", "_pyio": "io"}

EXPLAIN = (
    "What does `{name}` do?",
    "What does {name} do?",
    "What is {name}?",
    "Explain `{name}`.",
    "Explain {name}.",
    "Tell me about {name}.",
    "How does {name} work?",
    "What is `{name}` for?",
)
CALL = (
    "How do I call `{name}`?",
    "How do I use {name}?",
    "What are the parameters of {name}?",
    "What arguments does {name} take?",
    "Show me the signature of `{name}`.",
)
WRITE = (
    "Write a function `{name}({arguments})`. {summary}",
    "Show me the code of `{name}`. {summary}",
    "Write a Python function called {name}: {summary}",
    "Write a function {name}. {summary}",
)
MODULE = (
    "What is the module `{name}` for?",
    "What does the {name} module do?",
    "Tell me about the module {name}.",
    "What is {name}?",
    "Explain the {name} module.",
)
TOPIC = (
    'What does the Python documentation say about "{name}"?',
    "Explain {name} in Python.",
    "Explain the {name} statement.",
    "What does {name} mean in Python?",
    "What is {name} in Python?",
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with its answer."""

    question: str
    answer: str


def chat_documents(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Conversations, rendered as `CHAT_TEMPLATE` renders them, from `documents` (give training ones only)."""
    conversations: list[Document] = []
    for document in documents:
        conversations.extend(_conversations(document.path, list(_exchanges(document))))
    for copy in range(SMALL_TALK_COPIES):
        for number, (question, answer) in enumerate(SMALL_TALK):
            path = f"small-talk#{number}.{copy}"
            conversations.extend(_conversations(path, [Exchange(question, answer)]))
    return tuple(conversations)


def _conversations(path: str, exchanges: list[Exchange]) -> Iterator[Document]:
    """Mostly one exchange each; about one in eight carries on with another, one in six has a system turn."""
    for position, first in enumerate(exchanges):
        draw = _draw(f"{path}:{position}")
        turns = [first, exchanges[draw // 48 % len(exchanges)]] if draw % 8 == 0 else [first]
        body = "".join(f"{USER}{turn.question}{EOS}{ASSISTANT}{turn.answer}{EOS}" for turn in turns)
        system = f"{SYSTEM}{SYSTEM_PROMPT}{EOS}" if draw // 8 % 6 == 0 else ""
        yield Document(f"chat:{path}:{position}", f"{BOS}{system}{body}")


def _exchanges(document: Document) -> Iterator[Exchange]:
    if document.path.startswith(TOPICS_PATH):
        yield from _asked(TOPIC, document.path.partition("#")[2], _shortened(_without_heading(document.text)))
        return
    path = PurePosixPath(document.path)
    tree = parse_quietly(document.text)
    if tree is None or UNASKED_FOLDERS.intersection(path.parts):
        return
    module = _module_name(path)
    if text := ast.get_docstring(tree):
        yield from _asked(MODULE, module, _shortened(text))
    yield from _body_exchanges(document, tree, module)


def _body_exchanges(document: Document, node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Exchange]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        answer = _shortened(ast.get_docstring(child) or "")
        if answer:
            yield from _asked(EXPLAIN, name, answer)
        if isinstance(child, ast.ClassDef):
            yield from _body_exchanges(document, child, name)
        elif answer:
            summary = " ".join(answer.split("\n\n")[0].split())
            yield from _asked(CALL, name, f"```python\n{name}({ast.unparse(child.args)})\n```\n{summary}")
            if isinstance(node, ast.Module):
                yield from _code_exchanges(document, child, summary)


def _code_exchanges(
    document: Document, node: ast.FunctionDef | ast.AsyncFunctionDef, summary: str
) -> Iterator[Exchange]:
    lines = document.text.split("\n")[node.lineno - 1 : node.end_lineno]
    code = inspect.cleandoc("\n" + "\n".join(lines))
    if len(lines) > MAX_CODE_LINES or len(summary) > 200 or ">>>" in code:
        return
    for form in _chosen(WRITE, node.name):
        question = form.format(name=node.name, arguments=ast.unparse(node.args), summary=summary)
        yield Exchange(question, f"```python\n{code}\n```")


def _asked(forms: tuple[str, ...], name: str, answer: str) -> Iterator[Exchange]:
    """The same answer to some of the ways to ask for it."""
    if answer:
        for form in _chosen(forms, name):
            yield Exchange(form.format(name=name), answer)


def _shortened(text: str) -> str:
    """Whole paragraphs up to the limit or the first example; else a beginning that ends at a word."""
    paragraphs = text.strip().split("\n\n")
    kept = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if ">>>" in paragraph or len(kept) + 2 + len(paragraph) > MAX_ANSWER_CHARACTERS:
            break
        kept += "\n\n" + paragraph
    if len(kept) > MAX_ANSWER_CHARACTERS:
        kept = kept[:MAX_ANSWER_CHARACTERS].rpartition(" ")[0] + " ..."
    return kept.strip()


def _without_heading(text: str) -> str:
    """A documentation topic without its underlined first line."""
    heading, _, rest = text.strip().partition("\n\n")
    return rest if heading.endswith(("***", "===", "---")) else text


def _module_name(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    return PUBLIC_NAMES.get(name, name)


def _chosen(forms: tuple[str, ...], key: str) -> list[str]:
    """`FORMS_PER_FACT` of the forms, by the key alone."""
    first = _draw(key + forms[0])
    return [forms[(first + offset) % len(forms)] for offset in range(FORMS_PER_FACT)]


def _draw(key: str) -> int:
    """A number that depends on the key alone, so that the same library gives the same conversations."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
