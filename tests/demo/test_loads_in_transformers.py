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
from phalanx.runtime.executors.numpy import executor
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

Array = np.ndarray[Any, Any]

NUM_TOKENS = 24
WEIGHT_ONLY = {"w8a16": (), "w4a16": ("--group-size", "0"), "w4a16 g16": ("--group-size", "16")}
SCHEMES = {
    "fp8": (), "fp8-static": ("--kv-cache", "fp8"), "fp8-static smoothquant": ("--method", "smoothquant"),
    "int8": (), **WEIGHT_ONLY,
}  # fmt: skip
BOUNDS = {"fp8": 0.015, "fp8-static": 0.016, "fp8-static smoothquant": 0.016, "int8": 0.004}
"""Nats a token between the two programs: what each scheme may cost (`test_quantised_quality`). Where inputs are codes, tokens need not be
equal: one code that rounds to its neighbour changes those of later layers. int8 inputs even have another scale in compressed-tensors,
amax / 127.5 for amax / 127."""


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
    """``[T - 1, V]`` of what follows each token but the last."""
    import torch

    with torch.no_grad():
        rows: Array = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), -1).numpy()
    return rows[:-1]


def our_log_probabilities(llm: LLM, token_ids: list[int]) -> Array:
    """The same from Phalanx."""
    rows: list[Array] = []
    log_softmax = executor.log_softmax

    def recorded(logits: Any) -> Any:
        rows.append(log_softmax(logits))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "log_softmax", recorded)
        llm.generate([token_ids], SamplingParams(max_tokens=0, prompt_logprobs=0))
    return np.concatenate(rows)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    import torch

    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
    answer: list[int] = tokens[0].tolist()[len(prompt) :]
    return answer


@pytest.mark.parametrize("name", SCHEMES)
def test_same_distribution_and_for_weight_only_schemes_same_tokens(
    name: str, compressed_tensors: None, demo: Path, held_out: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert quantize(["--output", str(output), "--scheme", name.split()[0], *SCHEMES[name]]) == 0
    prompts = [entry["prompt_token_ids"] for entry in reference["greedy"]]
    # transformers reads no scales of caches, and its cache holds plain values.
    with LLM(output, engine="numpy", dtype="float32", kv_cache_dtype="float32") as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))
        assert llm.tokenizer is not None
        scored = list(llm.tokenizer.encode((held_out / "operator.txt").read_text("utf-8")))
        ours = our_log_probabilities(llm, scored)
    model = transformers_model(output)
    theirs = log_probabilities(model, scored)
    float_ones = log_probabilities(transformers_model(demo), scored)
    assert np.abs(theirs - float_ones).max() > 0.01, "it is quantised there"
    if name in BOUNDS:
        assert (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean() < BOUNDS[name]
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(np.ptp(theirs)))
        assert [greedy(model, prompt) for prompt in prompts] == [list(answer.token_ids) for answer in answers]


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
