"""Sampling defaults of the checkpoint: what a request leaves out, and what overrides them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from phalanx import LLM, SamplingParams
from phalanx.runtime.server.openai.encoding import _params
from phalanx.runtime.server.openai.parsing import parse_chat, parse_completion

ROOT = Path(__file__).parents[2]


class Services:
    """As much of `phalanx.runtime.server.services.Services` as parameters need."""

    class model:
        max_model_len = 100

    sampling_defaults: ClassVar[dict[str, Any]] = {"temperature": 0.5, "top_k": 7, "top_p": 0.8}


@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, (0.5, 7, 0.8)), ({"temperature": None}, (0.5, 7, 0.8)), ({"temperature": 0}, (0.0, 7, 0.8)), ({"top_k": -1, "top_p": 1}, (0.5, -1, 1.0))],
)  # fmt: skip
def test_a_request_inherits_what_it_leaves_out(
    parse: Any, fields: dict[str, Any], expected: tuple[float, int, float]
) -> None:
    body = (
        {"prompt": "a", **fields}
        if parse is parse_completion
        else {"messages": [{"role": "user", "content": "a"}], **fields}
    )
    params = _params(Services(), parse(msgspec.json.encode(body)), 5)  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.top_p) == expected


def test_llm_without_parameters_uses_them_and_given_parameters_are_taken_as_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(ROOT / "checkpoints/demo", directory)
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.0, "top_k": 3, "repetition_penalty": 1.1})
    )
    with LLM(directory, engine="numpy") as llm:
        assert llm.default_sampling_params == SamplingParams(temperature=0.0, top_k=3, repetition_penalty=1.1)
        assert (
            llm.generate(["import"])[0].token_ids
            == llm.generate(["import"], SamplingParams(temperature=0.0, repetition_penalty=1.1))[0].token_ids
        )
