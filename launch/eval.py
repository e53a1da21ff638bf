"""``python -m launch.eval``: loss, perplexity and bits per byte of a checkpoint on a text file."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    job_arguments,
    run_command,
)
from phalanx.launch.loading import start_llm
from phalanx.launch.progress import Progress
from phalanx.launch.sharing import read_text

if TYPE_CHECKING:
    from phalanx.runtime.llm import LLM
    from phalanx.runtime.request import RequestOutput, TokenDelta

__all__ = ["Evaluation", "Window", "evaluate", "main", "windows_over"]

WINDOWS_AT_ONCE = 64
"""Windows whose results are held at one time; bounds memory on long texts."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``stop`` of the text, seen together; those from ``first_scored`` on count."""

    start: int
    stop: int
    first_scored: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a text is predicted.

    Attributes:
        num_tokens: tokens scored; the first one, which nothing precedes, is not.
        num_bytes: bytes of UTF-8 that those tokens stand for.
        total_loss: their summed negative log-likelihood in nats.
    """

    num_tokens: int
    num_bytes: int
    total_loss: float

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.total_loss / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is beyond float64."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which the loss is not."""
        return self.total_loss / math.log(2) / self.num_bytes


def build_parser() -> CommandParser:
    """What to score, how, then model, layout and engine."""
    parser = CommandParser(prog="launch.eval", description="Loss and perplexity of a checkpoint on a text file.")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text; - is standard input")
    parser.add_argument("--context", type=int, metavar="TOKENS",
                        help="length of a window (default: the longest that the model allows)")  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="TOKENS",
                        help="how far each window moves on (default: context - 1; less gives tokens more context, slower)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    add_parallel_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, world = job_arguments(build_parser(), argv)
    text = read_text(world, "--text", args.text)

    with start_llm(args, world) as llm:
        context = llm.max_model_len if args.context is None else args.context
        stride = context - 1 if args.stride is None else args.stride
        started = time.perf_counter()
        evaluation = evaluate(llm, text, context, stride)
        if llm.is_leader:
            settings = {"context": context, "stride": stride, "seconds": time.perf_counter() - started}
            print(_to_json(evaluation, args, llm, settings) if args.json else _to_text(evaluation, args.text))
    return 0


def evaluate(llm: LLM, text: str, context: int, stride: int) -> Evaluation:
    """Score ``text`` in windows of ``context`` tokens, ``stride`` apart. *Collective.*

    Every token but the first is scored once, by the first window that holds it. Progress goes to standard error.

    Raises:
        RequestError: no tokenizer, a text of fewer than two tokens, or windows that do not fit the model.
    """
    from phalanx.parallel.errors import RequestError
    from phalanx.runtime.request import SamplingParams

    _check_windows(context, stride, llm.max_model_len)
    token_ids, num_bytes = _encode(llm, text)
    windows = list(windows_over(len(token_ids), context, stride))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    total_loss = 0.0
    # With replicas it shows the first one's share.
    with Progress("scoring", (len(token_ids) - 1) // llm.layout.dp, "tokens", shown=llm.is_leader) as progress:
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            batch = windows[first : first + WINDOWS_AT_ONCE]
            prompts = [token_ids[window.start : window.stop] for window in batch]
            outputs = llm.run(prompts, [params] * len(batch), _advance(progress, batch))
            for window, output in zip(batch, outputs, strict=True):
                if output.error is not None:
                    raise RequestError(f"tokens {window.start} to {window.stop} of the text: {output.error}")
                total_loss += _loss(window, output)
    return Evaluation(len(token_ids) - 1, num_bytes, total_loss)


def windows_over(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of ``num_tokens`` but the first once; ``stride`` is below ``context``."""
    start, scored = 0, 1
    while scored < num_tokens:
        stop = min(start + context, num_tokens)
        yield Window(start, stop, scored)
        start, scored = start + stride, stop


def _loss(window: Window, output: RequestOutput) -> float:
    assert output.prompt_logprobs is not None
    scored = output.prompt_logprobs[window.first_scored - window.start :]
    return -math.fsum(item.logprob for item in scored if item is not None)


def _encode(llm: LLM, text: str) -> tuple[list[int], int]:
    """The text's tokens after the tokenizer's own begin token, if it has one, and the bytes that are scored."""
    from phalanx.parallel.errors import RequestError

    if llm.tokenizer is None:
        raise RequestError("the checkpoint has no tokenizer.json, so a text cannot be scored; add it to the directory")
    token_ids = llm.tokenizer.encode(text, add_special_tokens=False)
    begin = llm.tokenizer.encode(text)[:1]
    unscored = 0
    if begin == token_ids[:1]:
        unscored = len(llm.tokenizer.decode(begin, skip_special_tokens=False).encode())
    else:
        token_ids = (*begin, *token_ids)
    if len(token_ids) < 2:
        raise RequestError("the text has fewer than two tokens, so nothing can be scored; give a longer one")
    return list(token_ids), len(text.encode()) - unscored


def _check_windows(context: int, stride: int, longest: int) -> None:
    from phalanx.parallel.errors import RequestError

    if not 2 <= context <= longest:
        raise RequestError(
            f"--context={context} is outside 2 to {longest}, the longest sequence of this model and cache"
        )
    if not 1 <= stride < context:
        raise RequestError(
            f"--stride={stride} is outside 1 to {context - 1}; a window must begin with a token of the one before it"
        )


def _advance(progress: Progress, windows: Sequence[Window]) -> Callable[[int, TokenDelta, str], None]:
    """What `LLM.run` calls as windows of this batch end."""

    def advance(index: int, delta: TokenDelta, text: str) -> None:
        if delta.finish_reason is not None:
            progress.advance(windows[index].stop - windows[index].first_scored)

    return advance


def _to_text(evaluation: Evaluation, path: Path) -> str:
    return (
        f"{path}: {evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes\n"
        f"loss           {evaluation.loss:.4f} nats a token\n"
        f"perplexity     {evaluation.perplexity:.4f}\n"
        f"bits per byte  {evaluation.bits_per_byte:.4f}"
    )


def _to_json(evaluation: Evaluation, args: argparse.Namespace, llm: LLM, settings: dict[str, Any]) -> str:
    import msgspec

    report = {
        "model": "demo" if args.model is None else str(args.model),
        "text": str(args.text),
        "num_tokens": evaluation.num_tokens,
        "num_bytes": evaluation.num_bytes,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        **settings,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "kv_cache_dtype": args.kv_cache_dtype,
        "device": llm.device,
        "tp": llm.layout.tp,
        "pp": llm.layout.pp,
        "dp": llm.layout.dp,
    }
    return msgspec.json.encode(report).decode()


if __name__ == "__main__":
    run_command(main)
