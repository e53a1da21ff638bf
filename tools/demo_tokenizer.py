# SPDX-License-Identifier: Apache-2.0
"""Train the demo checkpoint's tokenizer: BPE over characters, with bytes for every other character."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from demo_chat import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, SYSTEM, USER
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 6144
MAX_POSITIONS = 2048
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)
MIN_OCCURRENCES = 16
BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))

# Where people end a prompt, a token ends too: after a line end, a run of spaces, an opening bracket or a dot.
# Such a prompt is tokenized as the same text was in training.
PIECES = Regex(r"\r?\n| {2,}|\t+| ?_?\p{L}+|\p{N}{1,3}| ?[(\[{]| ?[^\s\p{L}\p{N}(\[{]+|\s")


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer of exactly `VOCAB_SIZE` entries that gives back every text it encodes; the same for the same texts."""
    alphabet = frequent_characters(texts)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        limit_alphabet=len(alphabet),  # left to itself, the trainer breaks ties between rare characters by chance
        initial_alphabet=alphabet,
        max_token_length=24,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return assemble([*SPECIAL_TOKENS, *BYTE_TOKENS, *learned], [tuple(merge) for merge in model["merges"]])


def frequent_characters(texts: Iterable[str]) -> list[str]:
    """Printable ASCII, line end, tab, and what occurs `MIN_OCCURRENCES` times; all else is spelt in bytes."""
    occurrences: Counter[str] = Counter()
    for text in texts:
        occurrences.update(text)
    frequent = {character for character, count in occurrences.items() if count >= MIN_OCCURRENCES}
    return sorted(frequent.union(map(chr, range(32, 127)), "\n\t"))


def assemble(entries: Sequence[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer of a vocabulary in id order; raises `ValueError` where an entry stands twice."""
    vocabulary = {entry: token_id for token_id, entry in enumerate(entries)}
    if len(vocabulary) != len(entries) or len(entries) != VOCAB_SIZE:
        raise ValueError(f"{len(entries)} entries, {len(vocabulary)} different, where {VOCAB_SIZE} were planned")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (chat template included)."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(PIECES, behavior="isolated")
