"""Models trained by the SentencePiece library, with texts that are hard to cut; ``python -m tests.text.sentencepiece_models`` records its ids."""

from __future__ import annotations

import base64
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("sentencepiece_ids.json")
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "日本語 émigré 12 34 가각 한글",
    "Ünïcödé ½ ﬁx ①② <|user|> ok <0 x41 <0x41> ab aab",
] * 20
ALPHABET = [
    *"abcdefghij klmno   'slt\n\t\r.,!?0123456789ABÉéñ日本語🦙\ufeff\x00\x01\x07\x1f\x7f\xa0\u2028\u3000ﬁ²½①▁Ａ한글",
    *"\u0301\u0302\u0308\u200d\u200c\ufe0f\u3099か\u1100\u1161\u11a8\u212b\ufdfa¨\u0345\u1e9b\u0323\ufffd\u00ad\u200b",
    "<|user|>", "▁▁", " the", " fox", "  ", "\n\n", "Ünïcödé", "<0x41>", "<0x0A>", "<0xFG>", "<", "ab", "aab", "bab",
]  # fmt: skip
"""Combining marks, joiners and jamo among them, which normalisation composes with what goes before."""
KINDS: dict[str, dict[str, Any]] = {
    "as Llama's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "as Gemma's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
                   "split_digits": True, "user_defined_symbols": ["<|user|>", "▁▁", "\n"]},
    "as Yi's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["<|user|>", "ab"]},
    "as T5's": {"normalization_rule_name": "nmt_nfkc"},
    "as T5's without a space before": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False},
    "in small letters": {"normalization_rule_name": "nmt_nfkc_cf", "user_defined_symbols": ["ab", "ba", "aab", "\u0301x", "ﬁx"]},
    "identity without spaces": {"normalization_rule_name": "identity"},
    "without bytes": {"byte_fallback": False, "vocab_size": 120, "user_defined_symbols": ["ab", "ba", "aab"]},
}  # fmt: skip
ALGORITHMS = ("bpe", "unigram")
RULES = {"ﬁ": "fi", "½": "1  2", "e\u0301": "é", "a\u0301\u0302": "â", "\u0301": "", "\t": " ", "가": "각각", "A": "a"}
"""Normalisation of the recorded models: a map of their own, as those of the library are 240 kB each."""


def train(algorithm: str, **fields: Any) -> bytes:
    """Return a model file of the library's."""
    import sentencepiece  # type: ignore[import-not-found, import-untyped, unused-ignore]

    writer = io.BytesIO()
    size = {"vocab_size": 370 if algorithm == "bpe" else 420, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=writer, model_type=algorithm, minloglevel=2, hard_vocab_limit=False,
        **(size | fields),
    )  # fmt: skip
    return writer.getvalue()


def texts(seed: str, count: int) -> list[str]:
    """Return texts of the alphabet in any order."""
    draw = random.Random(seed)
    return ["", "a", " ", *("".join(draw.choices(ALPHABET, k=draw.randrange(25))) for _ in range(count))]


def record() -> None:
    """Write what the installed library makes of texts."""
    import sentencepiece

    recorded = []
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        for old, new in RULES.items():
            rules.write("\t".join(" ".join(f"{ord(character):X}" for character in text) for text in (old, new)) + "\n")
        rules.flush()
        for algorithm in ALGORITHMS:
            for removes in (False, True):
                model = train(
                    algorithm, normalization_rule_tsv=rules.name, remove_extra_whitespaces=removes,
                    user_defined_symbols=["ab", "ba", "aab", "\u0301x"], byte_fallback=removes,
                    vocab_size=380 if removes else 130,
                )  # fmt: skip
                library = sentencepiece.SentencePieceProcessor(model_proto=model)
                ids = {text: library.encode(text) for text in texts(f"{algorithm} {removes}", 60)}
                recorded.append({"algorithm": algorithm, "model": base64.b64encode(model).decode(), "ids": ids})
    content = {"library": sentencepiece.__version__, "models": recorded}
    RECORD.write_text(json.dumps(content, ensure_ascii=True, indent=None) + "\n")


if __name__ == "__main__":
    record()
