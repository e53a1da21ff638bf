"""Blocks of model files whose branches meet in unusual ways, against the NumPy engine.

After the last layer's attention only rows that need logits go on, so branches that part before it meet rows of both kinds. And products of
few tokens, and norms before quantised weights, are not computed before their consumer is known, whatever that consumer is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import CASES_BY_NAME
from tests.support.fake_cupy import install_fake_device
from tests.support.thread_ranks import generate_on_threads

CONFIG = {
    **CASES_BY_NAME["llama-grouped-heads"].config,
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
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


def skip(config, layer):
    shape = (config.hidden_size, config.hidden_size)
    return WeightSpec(f"layers.{layer}.skip.weight", (Part(f"skip.{layer}", shape),))


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
    "a residual that is a product": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return ops.add(mlp, attended), ops.linear(residual, f"layers.{layer}.skip")

def block_weights(config, layer):
    return [*kept(config, layer, ".mlp_norm."), skip(config, layer)]
""",
    "a residual that is the output of a norm": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return ops.add(ops.add(mlp, attended), residual), y

def block_weights(config, layer):
    return kept(config, layer, ".mlp_norm.")
""",
    "the output of a norm after its residual has gone on": """
def block(ops, config, layer, x, residual):
    name = f"layers.{layer}"
    y, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    attended = blocks.attention(ops, name, layer, y, AttentionSpec.of(config))
    z, residual = ops.add_rms_norm(attended, residual, f"{name}.mlp_norm", config.norm_eps)
    skipped = ops.add(ops.linear(y, f"{name}.skip"), y)
    return ops.add(blocks.gated_mlp(ops, name, z, config.activation), skipped), residual

def block_weights(config, layer):
    return [*kept(config, layer), skip(config, layer)]
""",
    "a product at the end and no residual": """
def block(ops, config, layer, x, residual):
    y, mlp, attended, residual = parts(ops, config, layer, x, residual)
    return ops.linear(ops.add(ops.add(mlp, attended), residual), f"layers.{layer}.skip"), None

def block_weights(config, layer):
    return [*kept(config, layer, ".mlp_norm."), skip(config, layer)]
""",
}


def write_model(name: str, directory: Path) -> Path:
    """Write the configuration of a model of such blocks; returns its model file."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (file := directory / "mine.py").write_text(FILE.replace("BLOCK", BLOCKS[name]))
    return file


def generate(directory: Path, name: str, engine: str, pp: int, quantize: str) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    options = {"load_format": "dummy", "dtype": "float32", "quantize": quantize}
    return generate_on_threads(
        directory, PROMPTS, params, pp=pp, engine=engine, model_file=write_model(name, directory), **options
    )


@pytest.mark.parametrize(
    ("quantize", "pp"),
    [("none", 1), ("int8", 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in [("none", 2), ("int8", 1)])],
)
@pytest.mark.parametrize("name", BLOCKS)
def test_branches_give_the_numpy_engines_tokens(
    name: str, quantize: str, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    expected = generate(tmp_path, name, "numpy", 1, quantize)
    actual = generate(tmp_path, name, "cuda", pp, quantize)
    assert [output.token_ids for output in actual] == [output.token_ids for output in expected]
    pairs = [
        (one.logprob, other.logprob)
        for output, wanted in zip(actual, expected, strict=True)
        for one, other in zip(output.logprobs or (), wanted.logprobs or (), strict=True)
    ]
    assert len(pairs) == 8
    assert all(one == pytest.approx(other, abs=1e-3) for one, other in pairs)
