# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.generate``: continue prompts and print the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from phalanx.launch.arguments import (
    CommandParser,
    add_engine_arguments,
    add_model_arguments,
    add_parallel_arguments,
    job_arguments,
    path_or_stream,
    run_command,
)
from phalanx.launch.gathering import Gathering
from phalanx.launch.loading import start_llm
from phalanx.launch.progress import Progress
from phalanx.launch.results import InOrder, ResultFile, check_same_prompts, to_json
from phalanx.launch.sampling_arguments import add_sampling_arguments, given_fields, sampling_params
from phalanx.launch.sharing import agree, read_text
from phalanx.runtime.sampling.rules import MAX_INT32, TokenIds

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.llm import LLM, Prompt
    from phalanx.runtime.request import RequestOutput, SamplingParams, TokenDelta

__all__ = ["main"]

DEFAULTS = MappingProxyType({"max_tokens": 64, "temperature": 0.0})
"""Of this command, where they are not those of `SamplingParams`."""
PROMPTS_AT_ONCE = 1024
"""Prompts of each replica in one call, where there are several replicas."""


def build_parser() -> CommandParser:
    """Return the command's parser: prompts, sampling, output, then model, layout and engine."""
    parser = CommandParser(prog="launch.generate", description="Continue prompts and print the result.")
    prompts = parser.add_argument_group("prompts (at least one)")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    prompts.add_argument("--prompt-token-ids", action="append", default=[], metavar="1,2,3", help="repeatable")
    prompts.add_argument("--input-file", type=path_or_stream, metavar="FILE.jsonl",
                         help='- is standard input; lines of {"prompt": ...} or {"prompt_token_ids": [...]} and any sampling field')  # fmt: skip
    add_sampling_arguments(parser, DEFAULTS)
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print text as it is generated")
    output.add_argument("--json", action="store_true", help="one JSON object per prompt, in input order")
    output.add_argument("--output", type=Path, metavar="FILE.jsonl",
                        help="write JSON lines here, each as soon as all earlier ones are done")  # fmt: skip
    output.add_argument("--resume", action="store_true", help="keep what --output holds and generate only the rest")
    parser.no_effect("without --beam-width above 1; add that", lambda args: _is_free(args) and (args.beam_width or 1) < 2,
                     "--length-penalty")  # fmt: skip
    parser.no_effect("at --temperature 0, the default of this command; give another", lambda args: _is_free(args) and not args.temperature,
                     "--top-k", "--top-p", "--min-p")  # fmt: skip
    add_model_arguments(parser)
    add_parallel_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 if any prompt was refused."""
    parser = build_parser()
    args, world = job_arguments(parser, argv)
    _check(parser, args)

    prompts, params = _read_prompts(args, world)
    if args.stream and len(prompts) > 1:
        parser.error(
            f"--stream shows one prompt, there are {len(prompts)}; leave it out: results appear as they finish"
        )
    file, done = _open_output(args, world)
    with start_llm(args, world) as llm:
        if args.output is not None:
            agree(world, lambda: _same_prompts(args.output, done, llm, prompts))
        outputs = _generate(args, world, llm, prompts, params, file, done)
    refused = {index: str(entry.get("error")) for index, entry in done.items() if entry.get("finish_reason") == "error"}
    refused |= {output.index: str(output.error) for output in outputs if output.finish_reason == "error"}
    if refused and args.json and world.rank == 0:
        sys.stderr.write(f"phalanx: {_refusals(refused, len(prompts))}\n")
    return 2 if refused else 0


def _refusals(errors: Mapping[int, str], num_prompts: int) -> str:
    first = min(errors)
    return f'{len(errors)} of {num_prompts} prompt(s) have no answer, and "error" says why; the first is prompt {first}: {errors[first]}'


def _is_free(args: argparse.Namespace) -> bool:
    """Whether the flags alone say how to sample; lines of a file may say more."""
    return args.input_file is None


def _check(parser: CommandParser, args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, before any work."""
    if not (args.prompt or args.prompt_token_ids or args.input_file):
        parser.error("no prompt; give --prompt, --prompt-token-ids or --input-file")
    if args.resume and args.output is None:
        parser.error("--resume continues a file; name it with --output")
    args.json = args.json or args.output is not None
    if args.stream and args.json:
        parser.error("--stream prints text and --json prints results; give one of them")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.json:
            parser.error(f"--{name.replace('_', '-')} is only printed with --json or --output; add one of them")


def _open_output(args: argparse.Namespace, world: Communicator) -> tuple[ResultFile | None, dict[int, Any]]:
    """The file of rank 0, and on every rank the lines that it holds. *Collective.*"""
    if args.output is None:
        return None, {}
    opened: list[ResultFile] = []

    def on_rank_0() -> bytes:
        opened.append(ResultFile(args.output, args.resume))
        return json.dumps(opened[0].done).encode()

    done = {int(index): entry for index, entry in json.loads(agree(world, on_rank_0)).items()}
    return (opened[0] if opened else None), done


def _same_prompts(path: Path, done: dict[int, Any], llm: LLM, prompts: list[Prompt]) -> bytes:
    def token_ids(index: int) -> Sequence[int]:
        prompt = prompts[index]
        if not isinstance(prompt, str):
            return prompt
        return llm.tokenizer.encode(prompt) if llm.tokenizer is not None else ()

    check_same_prompts(path, done, len(prompts), token_ids)
    return b""


def _generate(
    args: argparse.Namespace,
    world: Communicator,
    llm: LLM,
    prompts: list[Prompt],
    params: list[SamplingParams],
    file: ResultFile | None,
    done: dict[int, Any],
) -> list[RequestOutput]:
    """Generate what is not done yet, printing on the leader. *Collective.*

    With replicas, every rank is given all results at the end of a call, so there are several.
    """
    pending = [index for index in range(len(prompts)) if index not in done]
    stream = _Stream() if args.stream and llm.is_leader else None
    write = file.write if file is not None else _printer(args, prompts)
    results = InOrder(write if llm.is_leader else lambda _: None, pending)
    outputs: list[RequestOutput] = []
    size = max(len(pending), 1) if llm.layout.dp == 1 else PROMPTS_AT_ONCE * llm.layout.dp
    with Progress("generating", len(pending), "prompts", shown=llm.is_leader) as progress:

        def take(output: RequestOutput) -> None:
            results.take(output)
            progress.advance()

        progress.advance(0)
        gathering = Gathering(world, llm.layout.dp, take)
        with _released(results, file, gathering):
            for start in range(0, len(pending), size):
                part = pending[start : start + size]

                def take_own(output: RequestOutput, part: list[int] = part) -> None:
                    gathering.take(_placed(output, part))

                finished = llm.run([prompts[i] for i in part], [params[i] for i in part], stream, take_own)
                for output in finished:
                    outputs.append(_placed(output, part))
                    gathering.take_shared(outputs[-1])
    if stream is not None:
        stream.end()
    return outputs


def _placed(output: RequestOutput, part: list[int]) -> RequestOutput:
    """The result of one of ``part`` of the prompts under its index in all of them."""
    return dataclasses.replace(output, index=part[output.index])


@contextmanager
def _released(results: InOrder, file: ResultFile | None, gathering: Gathering) -> Iterator[None]:
    """However it ends, what is finished is written."""
    complete = False
    try:
        yield
        complete = True
    finally:
        gathering.close()
        results.release()
        if file is not None:
            file.close(complete)


def _printer(args: argparse.Namespace, prompts: list[Prompt]) -> Callable[[RequestOutput], None]:
    def show(output: RequestOutput) -> None:
        if args.json:
            print(to_json(output), flush=True)
        elif output.error is not None:
            sys.stderr.write(f"phalanx: prompt {output.index}: {output.error}\n")
        elif not args.stream:
            print(_to_text(output, prompts[output.index]), flush=True)

    return show


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
        raise RequestError(f'prompt {place}: give either "prompt" (a string) or "prompt_token_ids" (a list of numbers)')
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
    """Prints the text of one prompt as it comes."""

    def __call__(self, index: int, delta: TokenDelta, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """The line ends with the text."""
        print(flush=True)


def _to_text(output: RequestOutput, prompt: Prompt) -> str:
    if output.text is None:
        return ",".join(map(str, output.token_ids))
    return f"{prompt}{output.text}" if isinstance(prompt, str) else output.text


if __name__ == "__main__":
    run_command(main)
