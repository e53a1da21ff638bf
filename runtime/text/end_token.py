# SPDX-License-Identifier: Apache-2.0
"""The end token that only the tokenizer names, found without building the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.backend import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, has_tokenizer, library_token_id
from phalanx.runtime.text.tokenizer_files import read_tokenizer_files

__all__ = ["tokenizer_end_token"]


class _Added(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: Any = None


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_Added] = []
    model: _Model = msgspec.field(default_factory=_Model)


def tokenizer_end_token(path: Path) -> int | None:
    """Return the id of ``eos_token``; None without a tokenizer, or if it has no such token.

    Raises:
        CheckpointError: a tokenizer file is broken.
    """
    directory = ModelDirectory.at(path)
    if not has_tokenizer(directory):
        return None
    files = read_tokenizer_files(directory)
    text = files.special_tokens.get("eos_token")
    if text is None:
        return None
    given = {token.content: token.id for token in files.added_tokens if token.id is not None}
    if text in given:
        return given[text]
    if not directory.has(TOKENIZER_FILE):
        return library_token_id(directory, files, text)
    try:
        tokenizer = msgspec.json.decode(directory.read(TOKENIZER_FILE, MAX_TOKENIZER_BYTES), type=_Tokenizer)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{directory.path / TOKENIZER_FILE!s} cannot be read: {error}; restore it") from None
    added = {token.content: token.id for token in tokenizer.added_tokens}
    return added.get(text, _place(text, tokenizer.model.vocab))


def _place(text: str, vocabulary: Any) -> int | None:
    """Id of a token in a vocabulary: texts with ids, or pairs of a text and a score in the order of ids."""
    if isinstance(vocabulary, dict):
        number = vocabulary.get(text)
        return number if isinstance(number, int) else None
    if isinstance(vocabulary, list):
        return next((i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry[:1] == [text]), None)
    return None
