"""Which tokens end an answer: generation_config.json before config.json, and the tokenizer's end token in any case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx import LLM
from phalanx.parallel.errors import CheckpointError, ConfigError
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.text import tokenizers_for_tests as made

WORDS = made.byte_level()
END = WORDS.token_to_id("<|end|>")


def directory(path: Path, eos: Any, **files: Any) -> Path:
    case = CASES_BY_NAME["llama-plain"]
    write_checkpoint(case, path)
    (path / "config.json").write_text(json.dumps({**case.config, "eos_token_id": eos}))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (2, None, None, (2,)),
        ([2, 3], None, None, (2, 3)),
        (None, None, None, ()),
        (2, {"eos_token_id": [5, 6]}, None, (5, 6)),
        (2, {"eos_token_id": None}, None, (2,)),
        (2, {"eos_token_id": []}, None, (2,)),
        (2, {"temperature": 0.5}, None, (2,)),
        (None, None, {"eos_token": "<|end|>"}, (END,)),
        (2, None, {"eos_token": "<|end|>"}, (2, END)),
        (2, {"eos_token_id": [5, END]}, {"eos_token": "<|end|>"}, (5, END)),
        (2, None, {"eos_token": "not in the vocabulary"}, (2,)),
        (2, None, {}, (2,)),
    ],
)
def test_precedence(config: Any, generation: Any, tokenizer: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    path = directory(tmp_path, config, **({} if generation is None else {"generation_config": generation}))
    if tokenizer is not None:
        WORDS.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer})
        )
    with LLM(path, engine="numpy") as llm:
        assert llm._replica.config.eos_token_ids == expected


@pytest.mark.parametrize("eos", [[2, None], [[2]], ["x"], {}, 10**20, 2.5, True])
@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_an_end_token_that_is_none_stops_the_start_not_the_first_request(place: str, eos: Any, tmp_path: Path) -> None:
    files = {"generation_config": {"eos_token_id": eos}} if place == "generation_config" else {}
    path = directory(tmp_path, eos if place == "config" else 2, **files)
    with pytest.raises(ConfigError, match=rf"eos_token_id.* in {place}\.json"):
        LLM(path, engine="numpy")


def test_a_broken_tokenizer_file_stops_the_start(tmp_path: Path) -> None:
    path = directory(tmp_path, 2)
    WORDS.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(CheckpointError, match="eos_token=3"):
        LLM(path, engine="numpy")
