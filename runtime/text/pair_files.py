# SPDX-License-Identifier: Apache-2.0
"""``vocab.json`` and ``merges.txt`` as a tokenizer: byte-pair encoding over bytes, as GPT-2 introduced it (Radford et al. 2019).

How texts are split into words stands in code, so it belongs to the tokenizer's class (`phalanx.runtime.text.special_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.special_tokens import WordSplit
from phalanx.runtime.token_fields import shown

__all__ = ["PAIR_FILES", "BytePairs", "pairs_to_backend", "read_pairs"]

PAIR_FILES = ("vocab.json", "merges.txt")
MAX_MERGES_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class BytePairs:
    """Token ids by text, bytes as GPT-2's characters for them, and pairs of tokens in the order of merging."""

    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]


def read_pairs(directory: ModelDirectory) -> BytePairs:
    """Read both files.

    Raises:
        CheckpointError: a token's id is no whole number or another token's, or a line is no pair of tokens that make a token.
    """
    vocabulary, merges = PAIR_FILES
    ids = directory.read_json(vocabulary)
    wrong = next((text for text, number in ids.items() if type(number) is not int or not 0 <= number < 1 << 31), None)
    if wrong is not None:
        raise CheckpointError(f"{shown(wrong)} has the id {shown(ids[wrong])} in {vocabulary}; ids are whole numbers")
    if len(set(ids.values())) != len(ids):
        raise CheckpointError(f"{vocabulary} gives two tokens the same id; restore the file")
    try:
        lines = directory.read(merges, MAX_MERGES_BYTES).decode().split("\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{merges} is not UTF-8 text; restore the file") from None
    pairs = []
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"line {number} of {merges} is no pair of tokens of {vocabulary} that make a token; restore both files"
            )
        pairs.append((left, right))
    return BytePairs(ids, tuple(pairs))


def pairs_to_backend(pairs: BytePairs, split: WordSplit | None, adds_space: bool) -> tokenizers.Tokenizer:
    """Return the tokenizer; without ``split`` words are GPT-2's. ``adds_space``: a space goes before the first word."""
    backend = tokenizers.Tokenizer(models.BPE(dict(pairs.ids), list(pairs.merges)))
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(split.pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=adds_space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    if split is not None and split.normalizes:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend
