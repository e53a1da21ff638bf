"""Configurations that nobody thought of: sampled fields, read as they are and saved again by transformers, give transformers' logits."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.sampled_configs import FAMILIES, sample
from tests.support.thread_ranks import generate_on_threads

from .test_against_transformers import log_softmax

TOLERANCE = 3e-5
"""Of the logits' range: some models amplify rounding more than the recorded ones."""
NUM_TOKENS = 5
LAYOUTS = ((2, 1), (3, 1), (1, 2), (2, 2), (1, 3))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(int(os.environ.get("PHALANX_TEST_SAMPLES", "1"))))
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_configurations_equal_transformers(family: str, seed: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config, draw = sample(family, seed), random.Random(seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = filled_model(tmp_path, seed)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "model.safetensors").hardlink_to(tmp_path / "saved" / "model.safetensors")
    prompt = tuple(draw.randrange(3, config["vocab_size"]) for _ in range(draw.randint(2, 45)))
    heads, layers = (
        config.get(new, config.get(old))
        for new, old in (("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"))
    )
    fitting = [(tp, pp) for tp, pp in LAYOUTS if tp <= heads and pp <= layers] or [(1, 1)]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, prompt_logprobs=3, logprobs=3)
    for directory, (tp, pp) in ((tmp_path, (1, 1)), (tmp_path / "saved", draw.choice(fitting))):
        (output,) = generate_on_threads(directory, [prompt], params, tp, pp)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output.token_ids[:-1]]]), use_cache=False).logits[0].numpy()
        assert largest_difference(output, logits) <= TOLERANCE * float(np.ptp(logits)), (config, directory, tp, pp)


def filled_model(directory: Path, seed: int) -> Any:
    """transformers' model of a ``config.json``, with weights whose magnitudes give logits some range."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = (
        {"experts_implementation": "eager"} if "num_experts_per_tok" in (directory / "config.json").read_text() else {}
    )
    options = {"attn_implementation": "eager", "dtype": torch.float32, **experts}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), **options).eval()
    generator, centre = torch.Generator().manual_seed(seed), 0.0 if "gemma" in model.config.model_type else 1.0
    with torch.no_grad():
        for name, value in dict(model.named_parameters()).items():
            noise = torch.randn(value.shape, generator=generator)
            is_vector = value.ndim == 1 or "norm" in name
            scaled = (
                noise * 0.2 + (0.0 if name.endswith("bias") else centre)
                if is_vector
                else noise * 1.4 / min(value.shape[-2:]) ** 0.5
            )
            value.copy_(scaled)
    return model


def largest_difference(output: RequestOutput, logits: np.ndarray) -> float:
    """Of any log-probability, and of a generated token from the best one."""
    rows = log_softmax(logits)
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    differences = [
        abs(value - rows[at, token])
        for at, entry in enumerate(entries)
        if entry is not None
        for token, value in entry.top
    ]
    generated = rows[-len(output.token_ids) :]
    behind = [row.max() - row[token] for row, token in zip(generated, output.token_ids, strict=True)]
    return float(max(*differences, *behind))
