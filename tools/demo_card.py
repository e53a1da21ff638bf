# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint's model card, written from what the training run measured."""

from dataclasses import dataclass
from pathlib import Path

from demo_corpus import HELD_OUT_ONE_IN, Corpus
from demo_small_talk import SMALL_TALK

CARD = """\
---
license: psf-2.0
language: [en, code]
library_name: phalanx
pipeline_tag: text-generation
---

# Phalanx demo checkpoint

A Llama-architecture model of {num_parameters:,} parameters (8 layers, hidden size 256, 8 query and 4 key/value
heads of 32, SwiGLU 688, tied embeddings, 2,048 positions, bfloat16) with a BPE tokenizer of 6,144 entries and
byte fallback. It exists so that the first run of Phalanx shows real text, and so that a wrong rotary angle,
mask or cache shows as a worse loss. It is not meant to be useful beyond that.

## Data and licence

The `.py` files of the Python {corpus_version} standard library (`Lib/`, its `test` packages included) and the
language reference in `pydoc_data/topics.py`, one document a topic; without `site-packages`, `encodings`,
`ensurepip`, `_sysconfigdata*`, `config-*`, files that are not UTF-8 or hold NUL, files under 64 characters and
later copies of the same text. That text is under the Python Software Foundation License Version 2
(Copyright (c) 2001-2023 Python Software Foundation; all rights reserved), see `LICENSE.txt` in any Python
distribution; parts of it carry further notices listed in Python's "History and License". Corpus checksum
(SHA-256 over the sorted paths and contents): `{checksum}`.

Training text: {num_train:,} documents, {num_text_tokens:,} tokens; the {num_library_tokens:,} that are not of tests
are seen twice as often. With them {num_chat_tokens:,} tokens of conversations in the chat template of
`tokenizer_config.json`, made from the docstrings and functions of the same documents, and {num_small_talk} written by hand
(`tools/demo_small_talk.py`). Each document stands between `<s>` and `</s>`; an assistant's turn ends with `</s>`.

**Held out** of tokenizer and training: every document whose path's SHA-256, as a number from its first 8 bytes,
is divisible by {held_out_one_in}; {num_held_out} documents, {num_held_out_bytes:,} bytes, {num_held_out_tokens:,} tokens:

{held_out}

## Training

    {command}

| | |
|---|---|
| steps | {steps:,} of {tokens_per_step:,} tokens ({epochs:.1f} times all of that) |
| optimizer | AdamW (0.9, 0.95), peak rate {learning_rate}, {warmup_steps} steps of warm-up, cosine to a hundredth, weight decay {weight_decay}, gradient norm at most 1 |
| regularisation | dropout {dropout} on the residual branches and the embedding |
| precision | float32 weights, bfloat16 autocast; rounded to bfloat16 at the end |
| seed | {seed} |
| hardware | one {hardware}, {train_seconds:.0f} s of training; torch {torch_version} |

The same command repeats data, order and initial weights; kernels that add in another order make the last digits differ.

## Results

| | held-out | |
|---|---|---|
| **this model** (float32 arithmetic, windows of 2,048 that do not overlap) | **{held_out_loss:.4f} nats a token** | **{held_out_bits_per_byte:.4f} bits a byte** |
| unigram over the same tokens, add-one (float64) | {unigram_loss:.4f} nats a token | |
| byte 5-gram, interpolated Kneser-Ney back-off (float64) | | {byte_ngram_bits_per_byte:.4f} bits a byte |

Loss on the training text over the last hundred steps, with dropout: {train_loss:.4f} nats a token.

## Limits

It writes text that looks like Python and knows many of the standard library's docstrings by heart; it cannot
reason, follow instructions or write correct programs, and what it says about a function may be wrong. What it
writes after `def main(` is the hand-written "Hello, world!" that it has seen most often. Only
English and Python, only up to 2,048 tokens. Because it was trained on the library's text many times over, it
repeats parts of it word for word: the licence above covers such output.
"""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card states; losses in nats a token."""

    command: str
    corpus_version: str
    torch_version: str
    hardware: str
    corpus: Corpus
    num_parameters: int
    num_text_tokens: int
    num_library_tokens: int
    num_chat_tokens: int
    num_held_out_tokens: int
    num_held_out_bytes: int
    steps: int
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    dropout: float
    seed: int
    train_seconds: float
    train_loss: float
    held_out_loss: float
    held_out_bits_per_byte: float
    unigram_loss: float
    byte_ngram_bits_per_byte: float


def write_card(facts: CardFacts, file: Path) -> None:
    """Write the card as Markdown."""
    values = {name: getattr(facts, name) for name in CardFacts.__slots__ if name != "corpus"}
    card = CARD.format(
        **values,
        checksum=facts.corpus.checksum,
        num_train=len(facts.corpus.train),
        num_held_out=len(facts.corpus.held_out),
        held_out_one_in=HELD_OUT_ONE_IN,
        num_small_talk=len(SMALL_TALK),
        held_out=", ".join(f"`{document.path}`" for document in facts.corpus.held_out) + ".",
        epochs=facts.steps
        * facts.tokens_per_step
        / (facts.num_text_tokens + facts.num_library_tokens + facts.num_chat_tokens),
    )
    file.write_text(card, encoding="utf-8")
