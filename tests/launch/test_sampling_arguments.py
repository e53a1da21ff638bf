"""Sampling flags and the fields of JSON lines: the table of sampling fields decides what is taken and what is refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch import generate
from phalanx.launch.sampling_arguments import add_sampling_arguments, given_fields, sampling_params
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import SAMPLING_FIELDS, SamplingParams


def parse(*flags: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser, {})
    return given_fields(parser.parse_args(flags))


def test_flags_become_fields_and_absent_ones_are_absent() -> None:
    assert parse() == {}
    flags = [
        "--max-tokens",
        "5",
        "--temperature",
        "0.5",
        "--top-k",
        "-1",
        "--top-p",
        "0.9",
        "--min-p",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
        "--logprobs",
        "0",
    ]
    assert parse(*flags) == {
        "max_tokens": 5, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.0, "stop": ["a", "b"], "ignore_eos": True,
        "logprobs": 0,
    }  # fmt: skip


@pytest.mark.parametrize("flags", ["--temperature nan", "--top-p inf", "--min-p 2", "--max-tokens -1", "--logprobs 21"])
def test_flags_out_of_range_are_refused_by_the_table(flags: str) -> None:
    with pytest.raises(RequestError) as caught:
        sampling_params(parse(*flags.split()), {})
    assert caught.value.param == flags.split()[0][2:].replace("-", "_")


def test_null_falls_back_to_the_commands_default() -> None:
    params = sampling_params({"max_tokens": None, "seed": None, "top_k": 3}, {"max_tokens": 64, "temperature": 0.0})
    assert params == SamplingParams(max_tokens=64, temperature=0.0, top_k=3)


def lines(tmp_path: Path, *entries: Any) -> list[tuple[Any, SamplingParams]]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    args = generate.build_parser().parse_args(["--input-file", str(path), "--top-k", "7", "--seed", "4"])
    return list(zip(*generate._read_prompts(args, SelfCommunicator()), strict=True))


def test_json_lines_override_flags_and_null_does_not(tmp_path: Path) -> None:
    (first, one), (second, two), (third, three) = lines(
        tmp_path,
        {"prompt": "a", "top_k": 2, "seed": 9, "max_tokens": 2.0},
        {"prompt_token_ids": [5, 6.0], "prompt": None, "top_k": None, "stop": None},
        {"prompt": "b", "temperature": 1e-38, "include_stop": False},
    )
    assert (first, tuple(second), third) == ("a", (5, 6), "b")
    assert one == SamplingParams(max_tokens=2, temperature=0.0, top_k=2, seed=9)
    assert two == SamplingParams(max_tokens=64, temperature=0.0, top_k=7, seed=4)
    assert three.temperature == 0.0


BAD = [{field.name: {"wrong": 1}} for field in SAMPLING_FIELDS] + [
    {"max_tokens": 2.5}, {"seed": True}, {"stop": [None]}, {"top_p": "1"}, {"logprobs": 1e300}, {"max_tokens": -1}, {"spee": 1},
    {"prompt": 5}, {"prompt_token_ids": [1]}, {"ignore_eos": 1}, {"min_tokens": 99},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: next(iter(fields)))
def test_a_bad_field_of_a_json_line_is_refused_with_its_place_and_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"prompt 1: .*{next(iter(fields))}"):
        lines(tmp_path, {"prompt": "a"}, {"prompt": "a", **fields})


@pytest.mark.parametrize("ids", [[1.5], [True], ["1"], [None], [-1], [2**31]])
def test_bad_token_ids_of_a_json_line_are_refused_with_their_place(tmp_path: Path, ids: list[Any]) -> None:
    with pytest.raises(RequestError, match="prompt 0: prompt_token_ids holds"):
        lines(tmp_path, {"prompt_token_ids": ids})
