"""What transformers computes for the small checkpoints: recorded in ``tests/reference``, or live where torch is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoints import CheckpointCase, write_checkpoint
from .oracles import load_oracle

__all__ = ["PROMPT_LENGTH", "Reference", "load_reference", "prompt_token_ids", "transformers_reference"]

FOLDER = Path(__file__).resolve().parent.parent / "reference"
PROMPT_LENGTH = 19
PREFIX_END = 11
NUM_GREEDY = 32


@dataclass(frozen=True, slots=True)
class Reference:
    """Logits over a prompt, ``[PROMPT_LENGTH, V]`` float32, and the 32 greedy tokens that follow it."""

    logits: np.ndarray
    greedy: tuple[int, ...]


def prompt_token_ids(case: CheckpointCase) -> tuple[int, ...]:
    """A fixed random prompt within the case's vocabulary, without its special tokens but those that end a prefix."""
    random = np.random.default_rng(len(case.name))
    tokens = random.integers(3, case.config.get("text_config", case.config)["vocab_size"], PROMPT_LENGTH).tolist()
    tokens[PREFIX_END : PREFIX_END + len(case.prefix_end)] = case.prefix_end
    return tuple(tokens)


def load_reference(case: CheckpointCase) -> Reference:
    """The recorded values (``python -m tools.record_reference`` writes them)."""
    with np.load(FOLDER / f"{case.name}.npz") as data:
        return Reference(data["logits"], tuple(data["greedy"].tolist()))


def transformers_reference(case: CheckpointCase, directory: Path, device: str = "cpu") -> Reference:
    """Compute the values with transformers, in float32, on a device of torch."""
    import torch

    model = load_oracle(case, write_checkpoint(case, directory)).to(device)
    token_ids = torch.tensor([prompt_token_ids(case)], device=device)
    with torch.no_grad():
        logits = model(token_ids).logits[0].float().cpu().numpy()
        for _ in range(NUM_GREEDY):
            token_ids = torch.cat((token_ids, model(token_ids).logits[:, -1:].argmax(-1)), dim=1)
    return Reference(logits, tuple(token_ids[0, PROMPT_LENGTH:].tolist()))
