# SPDX-License-Identifier: Apache-2.0
"""Train the demo checkpoint: `python tools/train_demo.py --output checkpoints/demo`.

Needs torch, tokenizers and safetensors, and a CUDA device for more than a trial. See tools/README.md.
"""

import argparse
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_baselines import ByteNgram, unigram_loss
from demo_card import CardFacts, write_card
from demo_chat import BOS, EOS, chat_documents
from demo_corpus import Corpus, is_test, read_corpus, standard_library
from demo_data import NO_TARGET, TokenIds, encode_documents, evaluation_rows, training_steps
from demo_model import Decoder, Shape, round_to_bfloat16, write_checkpoint
from demo_tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer

EVALUATION_ROWS = 8
TIMED_STEPS = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the network is trained; every field is a flag."""

    steps: int
    seconds: float | None
    rows: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    dropout: float
    seed: int


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """The corpus as token ids; `library` is the part of `text` that is not of tests."""

    corpus: Corpus
    text: list[TokenIds]
    library: list[TokenIds]
    chat: list[TokenIds]
    held_out: list[TokenIds]


def main() -> None:
    """Train, measure against the baselines, write everything under `--output`."""
    options = parse_options()
    started = time.perf_counter()
    corpus = read_corpus(options.corpus)
    say(f"{options.corpus}: {len(corpus.train)} + {len(corpus.held_out)} documents, sha256 {corpus.checksum}")
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(options, corpus)
    data = tokenize(tokenizer, corpus)
    say(f"{count(data.text)} tokens of text, {count(data.library)} of them not of tests; {since(started)}")
    say(f"{count(data.chat)} tokens of conversations, {count(data.held_out)} held out; {since(started)}")
    shape = Shape(vocab_size=tokenizer.get_vocab_size())
    recipe = recipe_of(options)
    decoder, steps, train_loss, seconds = train(shape, recipe, data, options)
    round_to_bfloat16(decoder)  # what the files will hold is what is measured
    measured = measure(decoder, shape, data)
    trained: dict[str, Any] = {"steps": steps, "train_loss": train_loss, "train_seconds": seconds}
    write_checkpoint(decoder, shape, tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS), options.output)
    write_card(CardFacts(**run_facts(recipe, data, options), **trained, **measured), options.output / "README.md")
    say("\n".join(f"{name} {value:.4f}" for name, value in measured.items()))
    say(since(started))


def tokenize(tokenizer: Tokenizer, corpus: Corpus) -> TokenizedCorpus:
    """Every document, and the conversations made from the training ones, as token ids."""
    text = encode_documents(tokenizer, corpus.train)
    return TokenizedCorpus(
        corpus,
        text,
        [tokens for tokens, document in zip(text, corpus.train, strict=True) if not is_test(document.path)],
        encode_documents(tokenizer, chat_documents(corpus.train), framed=True),
        encode_documents(tokenizer, corpus.held_out),
    )


def measure(decoder: Decoder, shape: Shape, data: TokenizedCorpus) -> dict[str, float]:
    """The network's and the baselines' results on the held-out documents, as the card names them."""
    rows = evaluation_rows(data.held_out, shape.max_position_embeddings)
    loss = evaluate(decoder, rows, mixed=False)
    held_out = [document.text.encode() for document in data.corpus.held_out]
    targets = np.concatenate([document[1:] for document in data.held_out])
    byte_ngram = ByteNgram([document.text.encode() for document in data.corpus.train])
    return {
        "held_out_loss": loss,
        "held_out_bits_per_byte": loss * len(targets) / math.log(2) / sum(map(len, held_out)),
        "unigram_loss": unigram_loss(np.concatenate(data.text), targets, shape.vocab_size),
        "byte_ngram_bits_per_byte": byte_ngram.bits_per_byte(held_out),
    }


def run_facts(recipe: Recipe, data: TokenizedCorpus, options: argparse.Namespace) -> dict[str, Any]:
    """What the card says about this run, results apart."""
    shape = Shape()
    names = ("learning_rate", "warmup_steps", "weight_decay", "dropout", "seed")
    return {
        **{name: getattr(recipe, name) for name in names},
        "command": shlex.join(["python", *sys.argv]),
        "corpus_version": options.corpus_version,
        "torch_version": torch.__version__,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "corpus": data.corpus,
        "num_parameters": sum(parameter.numel() for parameter in Decoder(shape, 0.0).parameters()),
        "num_text_tokens": count(data.text),
        "num_library_tokens": count(data.library),
        "num_chat_tokens": count(data.chat),
        "num_held_out_tokens": count(data.held_out) - len(data.held_out),
        "num_held_out_bytes": sum(len(document.text.encode()) for document in data.corpus.held_out),
        "tokens_per_step": recipe.rows * shape.max_position_embeddings,
    }


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--corpus", type=Path, default=standard_library(), help="a standard library's folder")
    parser.add_argument("--corpus-version", default=platform.python_version(), help="its version, for the card")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to keep, instead of training one")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps")
    parser.add_argument("--seconds", type=float, help="take fewer steps if that many would train longer than this")
    parser.add_argument("--rows", type=int, default=32, help="sequences of 2,048 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps between looks at the held-out loss")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    return parser.parse_args()


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The options that decide what is learned."""
    return Recipe(**{name: getattr(options, name) for name in Recipe.__slots__})


def prepare_tokenizer(options: argparse.Namespace, corpus: Corpus) -> Tokenizer:
    """The tokenizer, trained on the training documents or read, and written to the output."""
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    else:
        tokenizer = train_tokenizer([document.text for document in corpus.train])
    write_tokenizer(tokenizer, options.output)
    return tokenizer


def train(
    shape: Shape, recipe: Recipe, data: TokenizedCorpus, options: argparse.Namespace
) -> tuple[Decoder, int, float, float]:
    """The trained network, the steps taken, the last hundred steps' mean loss and the seconds it took."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder(shape, recipe.dropout).to(device)
    compute = decoder if options.eager else torch.compile(decoder)
    optimizer = make_optimizer(decoder, recipe, fused=device == "cuda")
    rng = np.random.default_rng(recipe.seed)
    documents = data.text + data.library + data.chat  # the library twice: users ask for it, not for tests
    steps = batches(training_steps(documents, recipe.rows, shape.max_position_embeddings, rng), device)
    rows = evaluation_rows(data.held_out, shape.max_position_embeddings)
    num_steps, losses, started = recipe.steps, [], time.perf_counter()
    step = 0
    while step < num_steps:
        if step == 1:
            _wait(device)
            timed_from = time.perf_counter()
        if step == 1 + TIMED_STEPS and recipe.seconds is not None:
            _wait(device)
            num_steps = affordable_steps(recipe, (time.perf_counter() - timed_from) / TIMED_STEPS, started)
            say(f"{num_steps} steps")
        losses.append(train_step(compute, optimizer, next(steps), learning_rate_at(step, num_steps, recipe)))
        step += 1
        if step % 100 == 0:
            say(f"step {step}/{num_steps} loss {torch.stack(losses[-100:]).mean():.4f} {since(started)}")
        if step % options.evaluate_every == 0:
            say(f"step {step} held out {evaluate(decoder, rows, mixed=True):.4f}")
    train_loss = float(torch.stack(losses[-100:]).mean())
    return decoder, num_steps, train_loss, time.perf_counter() - started


def batches(steps: Iterator[TokenIds], device: str) -> Iterator[torch.Tensor]:
    """The steps' tokens on the device."""
    for tokens in steps:
        host = torch.from_numpy(tokens)
        yield host.pin_memory().to(device, non_blocking=True) if device == "cuda" else host


def train_step(
    compute: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, learning_rate: float
) -> torch.Tensor:
    """One optimizer step; gives the mean loss in nats a token, left on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss = compute(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(compute.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def make_optimizer(decoder: Decoder, recipe: Recipe, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW; norms and the tied embedding do not decay."""
    decayed, kept = [], []
    for name, parameter in decoder.named_parameters():
        (decayed if parameter.dim() == 2 and "embed_tokens" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate_at(step: int, num_steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def affordable_steps(recipe: Recipe, step_seconds: float, started: float) -> int:
    """How many steps fit the seconds asked for, 5 % kept for looks at the held-out loss."""
    assert recipe.seconds is not None
    left = recipe.seconds * 0.95 - (time.perf_counter() - started)
    return min(recipe.steps, 1 + TIMED_STEPS + max(0, int(left / step_seconds)))


@torch.no_grad()
def evaluate(decoder: Decoder, rows: tuple[TokenIds, TokenIds], *, mixed: bool) -> float:
    """Mean nats a token over the evaluation rows, in bfloat16 autocast (`mixed`) or float32."""
    device = next(decoder.parameters()).device
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if mixed else "highest")
    decoder.eval()
    total = 0.0
    for first in range(0, len(rows[0]), EVALUATION_ROWS):
        inputs, targets = (torch.from_numpy(part[first : first + EVALUATION_ROWS]).to(device) for part in rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            total += float(decoder(inputs, targets))
    decoder.train()
    torch.set_float32_matmul_precision(precision)
    return total / int((rows[1] != NO_TARGET).sum())


def count(documents: list[TokenIds]) -> int:
    """Tokens in all documents."""
    return sum(map(len, documents))


def since(started: float) -> str:
    """The time since `started`, for people."""
    return f"{time.perf_counter() - started:.0f} s"


def say(line: str) -> None:
    """Progress, to standard error."""
    print(line, file=sys.stderr, flush=True)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
