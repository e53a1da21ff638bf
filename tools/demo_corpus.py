# SPDX-License-Identifier: Apache-2.0
"""The text that the demo checkpoint learns: a Python standard library's sources and documentation.

What counts as a document is decided by rules on the path and the content alone, so the same library
release gives the same corpus, checksum and held-out files on every machine.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 40
MIN_CHARACTERS = 64
TOPICS_PATH = "pydoc_data/topics.py"

# Not text a reader would learn Python from: other people's packages, generated character tables,
# bundled wheels, and modules that differ from build to build.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "ensurepip", "pydoc_data"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, named by its path under the library's folder (a documentation topic: `FILE#topic`)."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out documents, both sorted by path, and a checksum over all of them."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    checksum: str


def standard_library() -> Path:
    """The library folder of the interpreter that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> Corpus:
    """Read every document under `root`; raises `FileNotFoundError` where there is none."""
    documents = sorted(_without_duplicates(_documents(root)), key=lambda document: document.path)
    if not documents:
        raise FileNotFoundError(f"{root} holds no Python source; give the folder of a standard library with --corpus")
    return Corpus(
        train=tuple(document for document in documents if not is_held_out(document.path)),
        held_out=tuple(document for document in documents if is_held_out(document.path)),
        checksum=_checksum(documents),
    )


def is_held_out(path: str) -> bool:
    """Whether a document is kept from training: one path in `HELD_OUT_ONE_IN`, by its SHA-256."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def is_test(path: str) -> bool:
    """Whether a document belongs to a test package; more than half of the text does."""
    return not TEST_FOLDERS.isdisjoint(path.split("/"))


def parse_quietly(source: str) -> ast.Module | None:
    """The syntax tree, or None for the library's deliberately broken test files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such files also hold deliberate invalid escapes
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _documents(root: Path) -> Iterator[Document]:
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if _is_excluded(relative):
            continue
        text = _read_text(file)
        if text is not None and len(text) >= MIN_CHARACTERS:
            yield Document(relative.as_posix(), text)
    yield from _topics(root / TOPICS_PATH)


def _is_excluded(relative: Path) -> bool:
    return bool(EXCLUDED_FOLDERS.intersection(relative.parts)) or relative.parts[0].startswith(EXCLUDED_PREFIXES)


def _read_text(file: Path) -> str | None:
    """The file as text with `\\n` line ends; None where it is not UTF-8 or holds NUL (a test's own data)."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _topics(file: Path) -> Iterator[Document]:
    """The language reference that ships as one dictionary of strings for `help()`."""
    tree = parse_quietly(file.read_text(encoding="utf-8")) if file.is_file() else None
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign):
            for topic, text in ast.literal_eval(statement.value).items():
                yield Document(f"{TOPICS_PATH}#{topic}", text)


def _without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents without later copies of the same text, so that no held-out text is also trained on."""
    seen: set[str] = set()
    for document in sorted(documents, key=lambda document: document.path):
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _checksum(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\n{hashlib.sha256(document.text.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()
