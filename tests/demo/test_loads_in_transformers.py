# SPDX-License-Identifier: Apache-2.0
"""What ``launch.quantize`` writes, transformers reads through compressed-tensors as Phalanx does.

Equal tokens alone would say little, because most schemes do not change the recorded answers: transformers' log-probabilities must
also differ from those of the float checkpoint, as quantised ones do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import dequantize, quantize_rows
from phalanx.launch.quantize import main as quantize
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

Array = np.ndarray[Any, Any]

NUM_TOKENS = 24
WEIGHT_ONLY = {"w8a16": (), "w4a16": ("--group-size", "0"), "w4a16 g16": ("--group-size", "16")}
SCHEMES = {"fp8": (), "int8": (), **WEIGHT_ONLY}
NEAR_TIE = {"int8": 0.02}
"""compressed-tensors scales int8 inputs by amax / 127.5, and the definition here by amax / 127. Where the two best tokens are
nearer than this, in nats, either may follow. With the other schemes the tokens must be equal."""


@pytest.fixture(scope="module")
def compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def transformers_model(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        model(torch.tensor([[0, 1]]))  # the first call decompresses
    return model


def log_probabilities(model: Any, token_ids: list[int]) -> Array:
    """``[T - 1]`` of the tokens after the first."""
    import torch

    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), -1).numpy()
    result: Array = rows[np.arange(len(token_ids) - 1), token_ids[1:]]
    return result


def greedy(model: Any, prompt: list[int]) -> list[int]:
    import torch

    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
    answer: list[int] = tokens[0].tolist()[len(prompt) :]
    return answer


def assert_same_tokens(theirs: list[int], ours: RequestOutput, near_tie: float) -> None:
    """Equal, or equal up to a place where the two best tokens are nearer than ``near_tie``."""
    if theirs == list(ours.token_ids):
        return
    assert ours.logprobs is not None
    place = next(i for i, pair in enumerate(zip(theirs, ours.token_ids, strict=False)) if pair[0] != pair[1])
    (first, best), (second, other) = ours.logprobs[place].top
    assert best - other < near_tie, (place, theirs, ours.token_ids)
    assert {theirs[place], ours.token_ids[place]} == {first, second}


@pytest.mark.parametrize("name", SCHEMES)
def test_same_tokens_and_log_probabilities(
    name: str, compressed_tensors: None, demo: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert quantize(["--output", str(output), "--scheme", name.split()[0], *SCHEMES[name]]) == 0
    entries = reference["greedy"]
    prompts = [entry["prompt_token_ids"] for entry in entries]
    scored = prompts[0] + entries[0]["token_ids"]
    with LLM(output, engine="numpy", dtype="float32") as llm:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=2)
        ours = llm.generate(prompts, params)
        (whole,) = llm.generate([scored], SamplingParams(max_tokens=0, prompt_logprobs=0))
    model = transformers_model(output)
    for prompt, answer in zip(prompts, ours, strict=True):
        assert_same_tokens(greedy(model, prompt), answer, NEAR_TIE.get(name, 0.0))
    theirs = log_probabilities(model, scored)
    assert np.abs(theirs - log_probabilities(transformers_model(demo), scored)).max() > 0.01, "it is quantised there"
    if name in WEIGHT_ONLY:
        assert whole.prompt_logprobs is not None
        values = [item.logprob for item in whole.prompt_logprobs if item is not None]
        np.testing.assert_allclose(values, theirs, rtol=0, atol=2e-5)


def test_fp8_inputs_are_rounded_alike(compressed_tensors: None, tmp_path: Path) -> None:
    import torch

    output = tmp_path / "out"
    assert quantize(["--output", str(output), "--scheme", "fp8"]) == 0
    module = transformers_model(output).model.layers[3].self_attn.q_proj
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.tensor(x)[None])[0].numpy()
    weight = module.weight.detach().numpy()
    ours, plain = dequantize(quantize_rows(x)) @ weight.T, x @ weight.T
    assert np.linalg.norm(theirs - plain) > 0.01 * np.linalg.norm(plain)
    assert np.linalg.norm(theirs - ours) < 1e-3 * np.linalg.norm(plain)
