"""``python -m launch.generate``: continue prompts and print the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    engine_options,
    job_arguments,
    run_command,
)
from phalanx.launch.sampling_arguments import add_sampling_arguments, given_fields, sampling_params
from phalanx.launch.sharing import read_text
from phalanx.runtime.sampling.rules import MAX_INT32, TokenIds

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.llm import Prompt
    from phalanx.runtime.request import Logprob, RequestOutput, SamplingParams, TokenDelta

__all__ = ["main"]

DEFAULTS = MappingProxyType({"max_tokens": 64, "temperature": 0.0})
"""Of this command, where they are not those of `SamplingParams`."""


def build_parser() -> CommandParser:
    """Flags as in INTERFACES: prompts, sampling, output, then model, layout and engine."""
    parser = CommandParser(prog="launch.generate", description="Continue prompts and print the result.")
    prompts = parser.add_argument_group("prompts (at least one)")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    prompts.add_argument("--prompt-token-ids", action="append", default=[], metavar="1,2,3", help="repeatable")
    prompts.add_argument("--input-file", type=Path, metavar="FILE.jsonl",
                         help='- is standard input; lines of {"prompt": ...} or {"prompt_token_ids": [...]} and any sampling field')  # fmt: skip
    add_sampling_arguments(parser, DEFAULTS)
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print text as it is generated")
    output.add_argument("--json", action="store_true", help="one JSON object per prompt, in input order")
    add_model_arguments(parser)
    add_parallel_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 if any prompt was refused."""
    parser = build_parser()
    args, world = job_arguments(parser, argv)
    if not (args.prompt or args.prompt_token_ids or args.input_file):
        parser.error("no prompt; give --prompt, --prompt-token-ids or --input-file")

    from phalanx.runtime.llm import LLM

    prompts, params = _read_prompts(args, world)
    with LLM(args.model, comm=world, **engine_options(args)) as llm:
        progress = _Stream(len(prompts)) if args.stream and not args.json and llm.is_leader else None
        outputs = llm.run(prompts, params, progress)
        if llm.is_leader:
            _print_outputs(outputs, prompts, args, streamed=progress is not None)
    return 2 if any(output.finish_reason == "error" for output in outputs) else 0


def _read_prompts(args: argparse.Namespace, world: Communicator) -> tuple[list[Prompt], list[SamplingParams]]:
    from phalanx.parallel.errors import RequestError

    fields = {**given_fields(args), "seed": args.seed}
    given: list[dict[str, Any]] = [{"prompt": text} for text in args.prompt]
    given += [{"prompt_token_ids": _parse_token_ids(text)} for text in args.prompt_token_ids]
    if args.input_file is not None:
        given += _read_lines(args.input_file, read_text(world, "--input-file", args.input_file))
    if not given:
        raise RequestError(f'--input-file {args.input_file} holds no prompt; write lines like {{"prompt": "..."}}')
    prompts: list[Prompt] = []
    params = []
    for place, entry in enumerate(given):
        prompts.append(_take_prompt(entry, place))
        params.append(
            _sampling_params({**fields, **{name: value for name, value in entry.items() if value is not None}}, place)
        )
    return prompts, params


def _parse_token_ids(text: str) -> list[int]:
    from phalanx.parallel.errors import RequestError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(f"--prompt-token-ids {text!r} is not a list like 1,2,3") from None


def _read_lines(path: Path, text: str) -> list[dict[str, Any]]:
    import msgspec

    from phalanx.parallel.errors import RequestError

    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.DecodeError as error:
            raise RequestError(f"{path} line {number} is not a JSON object: {error}; write one object a line") from None
    return entries


def _take_prompt(entry: dict[str, Any], place: int) -> Prompt:
    from phalanx.parallel.errors import RequestError

    text, token_ids = entry.pop("prompt", None), entry.pop("prompt_token_ids", None)
    if isinstance(text, str) and token_ids is None:
        return text
    if text is not None or not isinstance(token_ids, list):
        raise RequestError(f'prompt {place}: give either "prompt" (a text) or "prompt_token_ids" (a list of numbers)')
    try:
        return TokenIds(most=MAX_INT32).check("prompt_token_ids", token_ids)
    except RequestError as error:
        raise RequestError(f"prompt {place}: {error}") from None


def _sampling_params(fields: dict[str, Any], place: int) -> SamplingParams:
    from phalanx.parallel.errors import RequestError

    try:
        return sampling_params(fields, DEFAULTS)
    except RequestError as error:
        raise RequestError(f"prompt {place}: {error}") from None


class _Stream:
    """Prints text as it comes. With several prompts a line says whose turn it is."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._last: int | None = None

    def __call__(self, index: int, delta: TokenDelta, text: str) -> None:
        if self._num_prompts > 1 and index != self._last and text:
            sys.stdout.write(f"\n[{index}] " if self._last is not None else f"[{index}] ")
            self._last = index
        sys.stdout.write(text)
        sys.stdout.flush()


def _print_outputs(
    outputs: list[RequestOutput], prompts: list[Prompt], args: argparse.Namespace, streamed: bool
) -> None:
    for output, prompt in zip(outputs, prompts, strict=True):
        if args.json:
            print(_to_json(output))
        elif output.error is not None:
            sys.stderr.write(f"launch.generate: prompt {output.index}: {output.error}\n")
        elif not streamed:
            print(_to_text(output, prompt))
    if streamed:
        print()


def _to_text(output: RequestOutput, prompt: Prompt) -> str:
    if output.text is None:
        return ",".join(map(str, output.token_ids))
    return f"{prompt}{output.text}" if isinstance(prompt, str) else output.text


def _to_json(output: RequestOutput) -> str:
    import msgspec

    def entry(item: Logprob | None) -> dict[str, Any] | None:
        return None if item is None else {"token_id": item.token_id, "logprob": item.logprob, "top": item.top}

    fields: dict[str, Any] = {
        "index": output.index,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "logprobs": None if output.logprobs is None else [entry(item) for item in output.logprobs],
        "prompt_logprobs": None if output.prompt_logprobs is None else [entry(item) for item in output.prompt_logprobs],
    }
    if output.error is not None:
        fields["error"] = output.error
    return msgspec.json.encode(fields).decode()


if __name__ == "__main__":
    run_command(main)
