# SPDX-License-Identifier: Apache-2.0
"""Rank files of tiktoken as a tokenizer: lines of a token in base64 and its rank, which is its id and the order of merging.

Source: ``tiktoken.load.load_tiktoken_bpe`` for the format. The pattern that splits texts into words stands in code, so it belongs to
the tokenizer's class (`phalanx.runtime.text.special_tokens`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.decoding_rules import characters_of_bytes
from phalanx.runtime.text.special_tokens import WordSplit

__all__ = ["is_rank_file", "ranks_to_backend", "read_ranks"]

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def is_rank_file(raw: bytes) -> bool:
    """Whether the content looks like one."""
    return _FIRST_LINE.match(raw) is not None


def read_ranks(raw: bytes, name: str) -> dict[bytes, int]:
    """Return the rank of each token.

    Raises:
        CheckpointError: a line is no token with its rank, or ranks are not 0, 1, 2, ... in any order.
    """
    ranks = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"line {number} of {name} is no token in base64 with its rank; restore the file"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"{name} has {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}; restore the file"
        )
    return ranks


def ranks_to_backend(ranks: Mapping[bytes, int], split: WordSplit) -> tokenizers.Tokenizer:
    """Return the tokenizer that encodes as tiktoken does: a word that is a token is that token, others are merged by rank."""
    vocabulary = {characters_of_bytes(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocabulary, _merges(ranks), ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    if split.normalizes:
        backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(split.pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, lowest rank of the result first."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(characters_of_bytes(left), characters_of_bytes(right)) for *_, left, right in sorted(found)]
