"""The tokenizer made for measurements is one that the server reads, with the size that was asked for."""

from __future__ import annotations

from pathlib import Path

from phalanx.runtime.text import Tokenizer
from tests.support.wide_tokenizer import write_wide_tokenizer


def test_a_wide_tokenizer_has_so_many_tokens_and_gives_text_back(tmp_path: Path) -> None:
    write_wide_tokenizer(tmp_path, 5000)
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = "the 2nd größe 😀"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True) == text
    texts = {tokenizer.decode([token_id], skip_special_tokens=True) for token_id in range(360, 5000)}
    assert len(texts) > 4000
    stream = tokenizer.text_stream()
    pieces = [stream.push([token_id]).text for token_id in (400, 4999, 700)]
    assert all(pieces)
