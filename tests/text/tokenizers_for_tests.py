"""Small tokenizers of every kind that the runtime decodes, made on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def main(argv):\n    return 0  # naïve café",
    "The quick brown fox jumps over the lazy dog.  Twice!",
    "日本語のテキストと emoji 🙂🙃 mixed",
    "Grüße aus Köln, çà et là — «ok»",
]


def byte_level() -> Tokenizer:
    """GPT-2 and Llama 3 style."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start é|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("  indented", special=False)])
    return tokenizer


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """Llama 2 (strip) and Gemma (no strip) style: SentencePiece marks, unknown characters as bytes."""
    pieces = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "▁fox", "e", "é", "日", "t", "h", "f", "o", "x", "▁t", "he", "!", "▁日"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "日")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    """T5 style: Metaspace and Unigram with byte fallback."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁", -3.0), ("▁fox", -4.0), ("▁▁", -5.0), ("a", -4.0), ("fo", -4.0), ("x", -4.0), ("é", -6.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    """A plain Metaspace decoder, which drops the mark that opens a text."""
    pieces = ["<unk>", "▁", "▁▁", "▁fox", "a", "b▁", "é", "<s>"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    """A decoder whose effect is not token by token."""
    pieces = ["[UNK]", "the", "fox", "##es", "jump", "##ed", ".", ",", "'", "s", "n", "t", "do", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer
