# SPDX-License-Identifier: Apache-2.0
"""Token windows for training and evaluation of the demo checkpoint."""

from collections.abc import Iterator, Sequence

import numpy as np
from demo_chat import BOS, EOS
from demo_corpus import Document
from numpy.typing import NDArray
from tokenizers import Tokenizer

TokenIds = NDArray[np.int64]
NO_TARGET = -100


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], *, framed: bool = False) -> list[TokenIds]:
    """Each document as `<s> text </s>`; with `framed`, the text already holds its own markers."""
    texts = [document.text if framed else f"{BOS}{document.text}{EOS}" for document in documents]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def training_steps(
    documents: Sequence[TokenIds], rows: int, length: int, rng: np.random.Generator
) -> Iterator[TokenIds]:
    """Endless steps of `[rows, length + 1]` tokens.

    Each epoch strings the documents together in a new order and cuts the string into windows, from a new
    offset. A quarter of the rows begins at a document instead, as a user's prompt does.
    """
    begin_rows = rows // 4
    columns = np.arange(length + 1)
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([documents[index] for index in order])
        starts = np.cumsum([0, *(len(documents[index]) for index in order)])
        starts = starts[starts + length + 1 <= len(stream)]
        windows = np.arange(rng.integers(length), len(stream) - length, length)
        rng.shuffle(windows)
        per_step = rows - begin_rows
        for first in range(0, len(windows) - per_step + 1, per_step):
            offsets = np.concatenate([windows[first : first + per_step], rng.choice(starts, begin_rows)])
            yield stream[offsets[:, None] + columns]


def evaluation_rows(documents: Sequence[TokenIds], length: int) -> tuple[TokenIds, TokenIds]:
    """Inputs and targets, `[rows, length]`, in which every token but a document's first is a target once.

    A long document is cut into windows that do not overlap, so a window's first tokens are predicted
    from little; the figures are the worse for it. Padding is token 0 with target `NO_TARGET`.
    """
    inputs, targets = [], []
    for document in documents:
        for start in range(0, len(document) - 1, length):
            piece = document[start : start + length + 1]
            padding = length + 1 - len(piece)
            inputs.append(np.pad(piece[:-1], (0, padding)))
            targets.append(np.pad(piece[1:], (0, padding), constant_values=NO_TARGET))
    return np.stack(inputs), np.stack(targets)
