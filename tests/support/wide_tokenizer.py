"""A tokenizer with as many entries as a real model's, for measurements where none can be downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

__all__ = ["write_wide_tokenizer"]

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
LETTERS = np.array(list("etaoinshrdlucmfwypvbgk"))


def write_wide_tokenizer(directory: Path, num_tokens: int) -> None:
    """Write ``tokenizer.json`` in the form of Gemma's: BPE of characters with bytes to fall back on, a word's space as U+2581.

    There are no merges, so a text becomes many short tokens; what generated ids are as text is as varied as in a real vocabulary.
    """
    vocab: dict[str, int] = {}
    for token in _tokens():
        vocab.setdefault(token, len(vocab))
        if len(vocab) == num_tokens:
            break
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))


def _tokens() -> Iterator[str]:
    """Special tokens, bytes, characters, then words of two to nine letters, half of them with a space in front."""
    yield from SPECIAL
    yield from (f"<0x{byte:02X}>" for byte in range(256))
    yield from ("\u2581", *map(chr, range(33, 127)))
    draw = np.random.default_rng(0)
    while True:
        for length in range(2, 10):
            for word in draw.choice(LETTERS, (1024, length)):
                yield ("\u2581" if word[0] < "m" else "") + "".join(word)
