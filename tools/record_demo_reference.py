# SPDX-License-Identifier: Apache-2.0
"""Record what `transformers` computes with the demo checkpoint, for the tests of Phalanx to agree with.

    python tools/record_demo_reference.py --corpus LIBRARY

Writes excerpts of held-out files to `tests/demo/held_out/` and the values to `tests/demo/reference.json`.
Needs torch and transformers; everything is computed in float32 on the CPU.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_chat import BOS
from demo_corpus import Document, read_corpus, standard_library
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINT = REPOSITORY / "checkpoints" / "demo"
TESTS = REPOSITORY / "tests" / "demo"

# Held-out file -> tokens from its beginning, `<s>` included; the longest fills all of the model's positions.
EXCERPTS = {
    "modulefinder.py": 2048,
    "asyncio/base_subprocess.py": 769,
    "operator.py": 512,
    "importlib/metadata/_functools.py": 257,
    "test/test_queue.py": 401,
    "tkinter/test/test_ttk/test_style.py": 333,
}
# One excerpt again in overlapping windows: tokens in a window, and how far each window moves on.
WINDOWED, WINDOW, STRIDE = "asyncio/base_subprocess.py", 256, 100
PROMPTS = ("def main(", "import os\n", "class Stack:\n", "for i in range(")
QUESTIONS = ("Hello", "What does textwrap.dedent do?", "Write hello world in Python.")
NUM_CONTINUED = 48
NUM_ANSWERED = 120


def main() -> None:
    """Record everything."""
    options = parse_options()
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    folder = TESTS / "held_out"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.corpus / "LICENSE.txt", folder / "LICENSE.txt")
    documents = {document.path: document for document in read_corpus(options.corpus).held_out}
    prompts = [(prompt, NUM_CONTINUED) for prompt in PROMPTS]
    prompts += [(f"<|user|>{question}</s><|assistant|>", NUM_ANSWERED) for question in QUESTIONS]
    reference = {
        "command": "python tools/record_demo_reference.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out": [
            record_loss(model, tokenizer, documents[path], length, folder) for path, length in EXCERPTS.items()
        ],
        "windowed": record_windowed_loss(model, tokenizer, folder / file_name(WINDOWED)),
        "greedy": [record_greedy(model, tokenizer, prompt, count) for prompt, count in prompts],
    }
    (TESTS / "reference.json").write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=standard_library(), help="the library that was trained on")
    return parser.parse_args()


def record_loss(model: Any, tokenizer: Tokenizer, document: Document, length: int, folder: Path) -> dict[str, Any]:
    """Write the document's first `length` tokens as text; record its mean and its tokens' losses, in nats."""
    text = document.text[: tokenizer.encode(document.text).offsets[length - 1][1]]
    encoding = tokenizer.encode(text)
    if len(encoding.ids) != length:
        again = len(encoding.ids)
        sys.exit(f"{document.path}: the first {length} tokens re-encode as {again}; choose another length")
    file = file_name(document.path)
    (folder / file).write_text(text, encoding="utf-8")
    losses = token_losses(model, encoding.ids)
    return {
        "file": file,
        "source": document.path,
        "num_tokens": length,
        "num_bytes": len(text.encode()),
        "loss": float(losses.mean()),
        "first_losses": [round(float(loss), 6) for loss in losses[:16]],
    }


def record_windowed_loss(model: Any, tokenizer: Tokenizer, file: Path) -> dict[str, Any]:
    """The mean loss when each token is scored by the first window that holds it, and no window sees further back."""
    ids = tokenizer.encode(file.read_text("utf-8")).ids
    losses: list[float] = []
    for start in range(0, len(ids), STRIDE):
        window = token_losses(model, ids[start : start + WINDOW]).tolist()
        losses += window[len(losses) - start :]
        if len(losses) == len(ids) - 1:
            break
    return {"file": file.name, "context": WINDOW, "stride": STRIDE, "loss": sum(losses) / len(losses)}


@torch.no_grad()
def token_losses(model: Any, token_ids: list[int]) -> torch.Tensor:
    """The loss in nats of each token but the first."""
    inputs = torch.tensor([token_ids])
    logits = model(inputs).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="none")


def file_name(path: str) -> str:
    """The excerpt's file name for a document's path."""
    return path.replace("/", ".").removesuffix(".py") + ".txt"


@torch.no_grad()
def record_greedy(model: Any, tokenizer: Tokenizer, prompt: str, count: int) -> dict[str, Any]:
    """Continue greedily up to the end token; `margin` is the smallest lead of a chosen token, in logits."""
    prompt_ids = tokenizer.encode(BOS + prompt, add_special_tokens=False).ids
    token_ids, margin = list(prompt_ids), float("inf")
    while len(token_ids) < len(prompt_ids) + count and token_ids[-1] != model.config.eos_token_id:
        best = model(torch.tensor([token_ids])).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
    continued = token_ids[len(prompt_ids) :]
    return {
        "prompt": prompt,
        "prompt_token_ids": prompt_ids,
        "token_ids": continued,
        "text": tokenizer.decode(continued),
        "finish_reason": "stop" if continued[-1] == model.config.eos_token_id else "length",
        "margin": round(margin, 4),
    }


if __name__ == "__main__":
    main()
