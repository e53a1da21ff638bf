"""After the last layer's attention only rows that need logits go on; blocks whose branches part before it meet rows of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.runtime.request import SamplingParams
from tests.support.checkpoints import CASES_BY_NAME
from tests.support.fake_cupy import install_fake_device
from tests.support.thread_ranks import generate_on_threads

CASE = CASES_BY_NAME["llama-grouped-heads"]
PROMPTS = [(3, 4, 5, 6, 7, 8, 9, 50, 60, 70, 80), (9, 8, 7)]
FILE = """
from dataclasses import replace
from phalanx.models import AttentionSpec, Part, WeightSpec, blocks, built_in

PHALANX_API = 1
LLAMA = built_in("LlamaForCausalLM")


def kept(config, layer, *dropped):
    return [spec for spec in LLAMA.decode.block_weights(config, layer) if not any(name in spec.name for name in dropped)]


def gate(config, layer):
    return WeightSpec(f"layers.{layer}.gate.weight", (Part(f"gate.{layer}", (1, config.hidden_size)),))


def parts(ops, config, layer, x, residual):
    name = f"layers.{layer}"
    y, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    mlp = blocks.gated_mlp(ops, name, y, config.activation)
    return y, mlp, blocks.attention(ops, name, layer, y, AttentionSpec.of(config)), residual

BLOCK

DECODE = replace(LLAMA.decode, block=block, block_weights=block_weights)
MODEL = replace(LLAMA, other_names=(), passes={"decode": DECODE})
"""
BLOCKS = {
    "attention that a gate of earlier rows weighs": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return ops.add(mlp, ops.sigmoid_gate(attended, y, f"layers.{layer}.gate")), residual

def block_weights(config, layer):
    return [*kept(config, layer, ".mlp_norm."), gate(config, layer)]
""",
    "earlier rows that a gate of attention weighs": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return ops.add(ops.sigmoid_gate(mlp, attended, f"layers.{layer}.gate"), attended), residual

def block_weights(config, layer):
    return [*kept(config, layer, ".mlp_norm."), gate(config, layer)]
""",
    "a residual with fewer rows than what is added": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return mlp, ops.add(attended, residual)

def block_weights(config, layer):
    return kept(config, layer, ".mlp_norm.")
""",
    "a last layer without attention": """
def block(ops, config, layer, x, residual):
    if layer + 1 < config.num_layers:
        return LLAMA.decode.block(ops, config, layer, x, residual)
    x, residual = ops.add_rms_norm(x, residual, f"layers.{layer}.mlp_norm", config.norm_eps)
    return blocks.gated_mlp(ops, f"layers.{layer}", x, config.activation), residual

def block_weights(config, layer):
    return kept(config, layer, *(() if layer + 1 < config.num_layers else (".attention_norm.", ".qkv.", ".output.")))
""",
}


def write_model(name: str, directory: Path) -> Path:
    """Write the configuration of a model of such blocks; returns its model file."""
    (directory / "config.json").write_text(json.dumps(CASE.config))
    (file := directory / "mine.py").write_text(FILE.replace("BLOCK", BLOCKS[name]))
    return file


@pytest.mark.parametrize("name", BLOCKS)
def test_branches_of_different_rows_give_the_numpy_engines_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    options: dict[str, Any] = {"model_file": write_model(name, tmp_path), "load_format": "dummy", "dtype": "float32"}
    expected = generate_on_threads(tmp_path, PROMPTS, params, **options)
    actual = generate_on_threads(tmp_path, PROMPTS, params, engine="cuda", **options)
    assert [output.token_ids for output in actual] == [output.token_ids for output in expected]
    pairs = [
        (one.logprob, other.logprob)
        for output, wanted in zip(actual, expected, strict=True)
        for one, other in zip(output.logprobs or (), wanted.logprobs or (), strict=True)
    ]
    assert len(pairs) == 8
    assert all(one == pytest.approx(other, abs=1e-3) for one, other in pairs)
