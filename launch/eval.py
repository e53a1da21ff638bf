# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.eval``: loss, perplexity and bits per byte of a checkpoint on a text file, and its divergence from another."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    job_arguments,
    path_or_stream,
    run_command,
)
from phalanx.launch.loading import start_llm
from phalanx.launch.sharing import agree, read_text

if TYPE_CHECKING:
    from phalanx.launch.divergence import Divergence
    from phalanx.launch.kept_logits import KeptLogits
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.config import QuantizeName
    from phalanx.runtime.executors.scored_logits import LogitsReader
    from phalanx.runtime.llm import LLM

__all__ = ["Evaluation", "evaluate", "main"]


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


@dataclass(frozen=True, slots=True)
class _Run:
    """One model on the text. ``quantisation``: words by part. ``logits`` only where there is another model to compare with."""

    evaluation: Evaluation
    windows: dict[str, int]
    setup: dict[str, Any]
    quantisation: dict[str, str]
    seconds: float
    logits: KeptLogits | None


def build_parser() -> CommandParser:
    """Return the command's parser: text and windows, reference, then model, layout and engine."""
    parser = CommandParser(
        prog="launch.eval",
        description="Loss and perplexity of a checkpoint on a text file, and with --against its divergence from another.",
    )
    parser.add_argument(
        "--text", type=path_or_stream, required=True, metavar="FILE", help="UTF-8 text; - is standard input"
    )
    parser.add_argument("--context", type=int, metavar="TOKENS",
                        help="length of a window (default: the longest that the model allows, and its reference)")  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="TOKENS",
                        help="how far each window moves on (default: context - 1; less gives tokens more context, slower)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    _add_reference_arguments(parser)
    add_parallel_arguments(parser)
    add_engine_arguments(parser)
    return parser


def _add_reference_arguments(parser: CommandParser) -> None:
    """``--against``, and how the reference runs: quantisation and cache as its checkpoint says, the rest as the model."""
    from phalanx.runtime.config import DTypeName, KvCacheDType, QuantizeName
    from phalanx.runtime.executors.registry import ENGINES

    group = parser.add_argument_group("reference (runs after the model, on the same ranks)")
    group.add_argument("--against", type=Path, metavar="DIR",
                       help="report the KL divergence from this checkpoint, and how many best tokens change")  # fmt: skip
    group.add_argument("--against-quantize", choices=get_args(QuantizeName), default="none",
                       help="its --quantize (default: none)")  # fmt: skip
    group.add_argument("--against-kv-cache-dtype", choices=get_args(KvCacheDType), default="auto",
                       help="its --kv-cache-dtype (default: auto)")  # fmt: skip
    group.add_argument("--against-dtype", choices=get_args(DTypeName),
                       help="its --dtype (default: the model's)")  # fmt: skip
    group.add_argument("--against-engine", choices=("auto", *ENGINES), help="its --engine (default: the model's)")
    group.add_argument("--against-tp", type=int, metavar="N", help="its --tp (default: the model's)")
    group.add_argument("--against-pp", type=int, metavar="N", help="its --pp (default: the model's)")
    parser.no_effect("without --against, the model that it describes; add that", lambda args: args.against is None,
                     "--against-quantize", "--against-kv-cache-dtype", "--against-dtype", "--against-engine", "--against-tp",
                     "--against-pp")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, world = job_arguments(build_parser(), argv)
    reference_args = _reference_arguments(args)
    if reference_args is not None:
        agree(world, lambda: _read_reference(reference_args, world.size))
    text = read_text(world, "--text", args.text)
    longest = int(agree(world, lambda: _check_text(args, text)))

    reference, divergence = None, None
    with ExitStack() as files:
        keeping = None if reference_args is None else files
        model = _run(args, world, text, keeping, longest)
        if reference_args is not None:
            for name, value in model.windows.items():
                setattr(reference_args, name, value)
            with _named(reference_args.model):
                reference = _run(reference_args, world, text, keeping, longest)
            divergence = _divergence(reference, model, world)
    if world.rank == 0:
        show = _to_json if args.json else _to_text
        print(show(args.text, model, reference, divergence))
    return 0


def evaluate(llm: LLM, text: str, context: int, stride: int) -> Evaluation:
    """Score ``text`` in windows of ``context`` tokens, ``stride`` apart. *Collective.*

    Every token but the first is scored once, by the first window that holds it. Progress goes to standard error.

    Raises:
        RequestError: no tokenizer, a text of fewer than two tokens, or windows that do not fit the model.
    """
    from phalanx.launch.scoring import encode

    return _score(llm, *encode(llm.tokenizer, text), context, stride)


def _score(
    llm: LLM, token_ids: Sequence[int], num_bytes: int, context: int, stride: int, reader: LogitsReader | None = None
) -> Evaluation:
    """``evaluate`` a text of which the tokens are known; ``reader`` is shown all logits."""
    from phalanx.launch.scoring import scored_tokens

    windows = scored_tokens(llm, token_ids, context, stride, reader)
    total_loss = -math.fsum(item.logprob for window in windows for item in window)
    return Evaluation(len(token_ids) - 1, num_bytes, total_loss)


def _reference_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """The reference's arguments, under the names of the model's; None without ``--against``."""
    given = {
        "quantize": args.against_quantize,
        "kv_cache_dtype": args.against_kv_cache_dtype,
        **{
            name: value
            for name in ("dtype", "engine", "tp", "pp")
            if (value := getattr(args, f"against_{name}")) is not None
        },
    }
    if args.against is None:
        return None
    reference = copy.copy(args)
    for name, value in {**given, "model": args.against}.items():
        setattr(reference, name, value)
    return reference


def _read_reference(args: argparse.Namespace, world_size: int) -> bytes:
    """Find out before the text is read and the model runs whether the reference is there, and fits its flags.

    Raises:
        CheckpointError: it is not there.
        ConfigError: its layout does not fit the ranks or its layers, its types each other, or its engine this machine.
    """
    from phalanx.checkpoints.config_files import read_config
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.kernels.device import visible_gpus
    from phalanx.launch.arguments import engine_config
    from phalanx.parallel.errors import ConfigError
    from phalanx.runtime.executors.registry import choose_engine
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file
    from phalanx.runtime.quantisation import check_cache_dtype

    config = read_config(ModelDirectory.at(args.model))
    model = find_model(config, model_from_file(args.model_file))
    try:
        options, declared = engine_config(args, world_size), model.read_config(config)
        model.stages(declared, options.layout.pp)
        check_cache_dtype(options, declared.compute_dtype(options.dtype))
        if choose_engine(args.engine) != "numpy":
            visible_gpus()
    except ConfigError as error:
        raise ConfigError(
            f"--against {args.model} (with the model's flags, but for those that begin with --against-): {error}"
        ) from None
    return b""


@contextmanager
def _named(against: Path) -> Iterator[None]:
    """Mistakes that are found with the reference say so: it has flags and a directory of the model's kind."""
    from phalanx.parallel.errors import CheckpointError, ConfigError, RequestError

    try:
        yield
    except (ConfigError, CheckpointError, RequestError) as error:
        raise type(error)(f"--against {against}: {error}") from error


class _Side(NamedTuple):
    """What ``config.json`` and the tokenizer tell of a model and the text."""

    vocab_size: int
    longest: int
    token_ids: list[int]


def _check_text(args: argparse.Namespace, text: str) -> bytes:
    """Find out before a model is loaded whether it can score the text, and be compared; the longest sequence of both, as digits.

    Raises:
        ConfigError: vocabularies of two sizes, one that is to be quantised while it is loaded is quantised already, or the
            reference cannot hold a window.
        RequestError: the two cut the text into different tokens, it cannot be scored, or windows do not fit the model.
    """
    from phalanx.checkpoints.config_files import demo_path
    from phalanx.launch.scoring import check_windows

    model = _read_side(args, args.model or demo_path(), args.quantize, "--quantize", text)
    longest = model.longest
    if args.against is not None:
        with _named(args.against):
            reference = _read_side(args, args.against, args.against_quantize, "--against-quantize", text)
        _check_pair(args, model, reference)
        longest = min(longest, reference.longest)
    context = longest if args.context is None else args.context
    check_windows(context, context - 1 if args.stride is None else args.stride, longest)
    return str(longest).encode()


def _read_side(args: argparse.Namespace, path: Path, quantize: QuantizeName, flag: str, text: str) -> _Side:
    from phalanx.checkpoints.config_files import read_config
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.checkpoints.formats import read_formats
    from phalanx.launch.scoring import encode
    from phalanx.runtime.executors.sizes import longest_requested
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file
    from phalanx.runtime.quantisation import check_quantize
    from phalanx.runtime.text import Tokenizer

    directory = ModelDirectory.at(path)
    config = read_config(directory)
    model = find_model(config, model_from_file(args.model_file))
    declared = model.read_config(config)
    check_quantize(model, declared, read_formats(config), quantize, flag)
    token_ids, _ = encode(Tokenizer.from_directory(directory.path), text)
    return _Side(declared.vocab_size, longest_requested(declared, args.max_model_len), token_ids)


def _check_pair(args: argparse.Namespace, model: _Side, reference: _Side) -> None:
    from phalanx.parallel.errors import ConfigError, RequestError

    if model.vocab_size != reference.vocab_size:
        raise ConfigError(
            f"--against {args.against} has a vocabulary of {reference.vocab_size} tokens, but the model one of {model.vocab_size}; give the "
            "checkpoint that the model was made from"
        )
    if model.token_ids != reference.token_ids:
        raise RequestError(
            f"--against {args.against} cuts the text into other tokens; give a model with the same tokenizer"
        )
    if args.context is not None and reference.longest < args.context <= model.longest:
        raise ConfigError(
            f"--context={args.context} is beyond the {reference.longest} tokens that --against {args.against} takes; use at most "
            f"{reference.longest}"
        )


def _run(args: argparse.Namespace, world: Communicator, text: str, keeping: ExitStack | None, longest: int) -> _Run:
    """Load one model and score the text. *Collective.*

    Args:
        keeping: for as long its logits are kept.
        longest: what windows that no flag gives must not exceed, because the reference takes no more.
    """
    from phalanx.launch.kept_logits import keeping_logits
    from phalanx.launch.scoring import check_windows, encode, windows_over

    with start_llm(args, world) as llm:
        context = args.context
        if context is None:
            context = min(llm.max_model_len, longest)
        stride = context - 1 if args.stride is None else args.stride
        started = time.perf_counter()
        token_ids, num_bytes = encode(llm.tokenizer, text)
        logits = None
        if keeping is not None:
            check_windows(context, stride, llm.max_model_len)
            windows = list(windows_over(len(token_ids), context, stride))
            logits = keeping.enter_context(keeping_logits(windows, len(token_ids) - 1))
        evaluation = _score(llm, token_ids, num_bytes, context, stride, logits)
        seconds = time.perf_counter() - started
        used = {"context": context, "stride": stride}
        return _Run(evaluation, used, _setup(args, llm), llm.quantisation_by_part, seconds, logits)


def _setup(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    layout = llm.layout
    return {
        "model": "demo" if args.model is None else str(args.model), "dtype": args.dtype, "quantize": args.quantize,
        "kv_cache_dtype": args.kv_cache_dtype, "device": llm.device, "tp": layout.tp, "pp": layout.pp, "dp": layout.dp,
    }  # fmt: skip


def _divergence(reference: _Run, model: _Run, world: Communicator) -> Divergence:
    from phalanx.launch.divergence import compare

    assert reference.logits is not None
    assert model.logits is not None
    return compare(reference.logits, model.logits, world)


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {
        "loss": evaluation.loss, "perplexity": evaluation.perplexity, "bits_per_byte": evaluation.bits_per_byte,
    }  # fmt: skip


def _to_text(path: Path, model: _Run, reference: _Run | None, divergence: Divergence | None) -> str:
    evaluation = model.evaluation
    head = f"{path}: {evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes\n"
    if reference is None or divergence is None:
        return (
            f"{head}loss           {evaluation.loss:.4f} nats a token\n"
            f"perplexity     {evaluation.perplexity:.4f}\n"
            f"bits per byte  {evaluation.bits_per_byte:.4f}"
        )
    rows = [("", "model", "reference")]
    setups = [run.setup | run.quantisation for run in (model, reference)]
    rows += [(name.replace("_", " "), str(value), str(setups[1][name])) for name, value in setups[0].items()]
    others = _figures(reference.evaluation)
    rows += [
        (name.replace("_", " "), f"{value:.4f}", f"{others[name]:.4f}") for name, value in _figures(evaluation).items()
    ]
    wide = [max(len(row[column]) for row in rows) + 2 for column in range(2)]
    table = "".join(f"{name:{wide[0]}}{one:{wide[1]}}{other}\n" for name, one, other in rows)
    return head + table + divergence.description


def _described(run: _Run) -> dict[str, Any]:
    from phalanx.runtime.quantisation import in_one_line

    return {**run.setup, "quantisation": in_one_line(run.quantisation)}


def _to_json(path: Path, model: _Run, reference: _Run | None, divergence: Divergence | None) -> str:
    import msgspec

    report: dict[str, Any] = {
        "text": str(path),
        "num_tokens": model.evaluation.num_tokens,
        "num_bytes": model.evaluation.num_bytes,
        **_figures(model.evaluation),
        **model.windows,
        "seconds": model.seconds,
        **_described(model),
    }
    if reference is not None and divergence is not None:
        report["against"] = {
            **_described(reference), **_figures(reference.evaluation), "seconds": reference.seconds, **divergence.figures,
        }  # fmt: skip
    return msgspec.json.encode(report).decode()


if __name__ == "__main__":
    run_command(main)
