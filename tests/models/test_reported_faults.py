"""Faults reported against other engines, planted here: each must move log-probabilities away from the recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import find_model, registry
from phalanx.runtime.request import SamplingParams
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

from .test_against_transformers import TOLERANCE, log_softmax, run_layout

ConfigChange = Callable[[Any], Any]


def fields(**changes: Any) -> ConfigChange:
    return lambda config: replace(config, **changes)


def other_pairs(config: Any) -> Any:
    return replace(config, rope=replace(config.rope, interleaved=not config.rope.interleaved))


def wider_windows(config: Any) -> Any:
    if hasattr(config, "window"):
        return replace(config, window=config.window + 1)
    return replace(config, windows=tuple(window and window + 1 for window in config.windows))


def no_windows(config: Any) -> Any:
    return replace(config, windows=(0,) * config.num_layers)


FAULTS: dict[str, tuple[tuple[str, ...], ConfigChange]] = {
    "neighbouring channels taken for halves, or halves for them (vllm#747, #590, #941, #42016, #42765, #49290)": (
        ("gptj-plain", "glm-plain", "glm4-plain", "chatglm-groups", "cohere-head-norms", "cohere2-windows", "phi3-window"),
        other_pairs,
    ),
    "a window off by one (TRT-LLM#5564, vllm#3385)": (
        ("mistral-window", "gemma2-caps", "gemma3-windows", "qwen2-windows", "qwen3-windows", "phi3-window",
         "starcoder2-window", "cohere2-windows", "smollm3-windows"),
        wider_windows,
    ),
    "windows dropped without a word (vllm#5908, #15705)": (("gemma2-caps", "gemma3-windows", "qwen2-windows"), no_windows),
    "no window beyond its length (vllm#2064)": (("mistral-window", "phi3-window"), no_windows),
    "the cap on scores dropped without a word (vllm#6220)": (("gemma2-caps",), fields(score_cap=0.0)),
    "the cap on logits dropped without a word (vllm#7442)": (("gemma2-caps",), fields(logit_cap=0.0)),
    "scores scaled by the head's size (vllm#5908)": (("gemma2-caps", "gemma3-windows"), fields(query_scalar=16.0)),
    "rope scaling on layers with a window (TRT-LLM#4815)": (
        ("gemma3-windows", "gemma3-version-5-spelling"), lambda config: replace(config, local_rope=config.rope),
    ),
    "another epsilon (TRT-LLM#4815)": (("gemma3-windows", "glm-plain", "phi3-window"), fields(norm_eps=1e-2)),
    "the other GELU (litgpt#1031)": (("gemma-one-kv-head", "starcoder2-window"), fields(activation="gelu")),
    "13B without ALiBi (sglang#16868, Baichuan2#225)": (
        ("baichuan-13b",), fields(rope=RopeConfig(rotary_dim=16)),
    ),
    "slopes that end at another bias (MPT in transformers)": (("mpt-flat-biases",), fields(bias_max=8.0)),
    "q, k and v not clipped": (("mpt-clipped",), fields(clip_qkv=0.0)),
    "rope_ratio ignored (vllm#1841)": (
        ("chatglm-groups",), lambda config: replace(config, rope=replace(config.rope, theta=1e4)),
    ),
    "logit_scale ignored (litgpt#1089, llama.cpp#6033)": (("cohere-head-norms", "cohere2-windows"), fields(logit_scale=1.0)),
    "a rotary embedding in every layer": (("smollm3-plain",), fields(rotates=(True,) * 4)),
    "residual_multiplier ignored": (("granite-factors",), fields(residual_multiplier=1.0)),
    "a prefix that sees only what came before": (("chatglm1-prefix",), fields(prefix_end=())),
    "one stream of positions": (
        ("chatglm1-prefix",), lambda config: replace(config, rope=replace(config.rope, two_dimensional=False)),
    ),
}  # fmt: skip


def deviation(case: CheckpointCase, directory: Path, tp: int = 1) -> float:
    """The largest difference from the recorded log-probabilities, as a share of the logits' range."""
    reference, prompt = load_reference(case), prompt_token_ids(case)
    expected, output = log_softmax(reference.logits), run_layout(directory, tp, 1, prompt, max_tokens=1)
    assert output.prompt_logprobs is not None
    differences = [
        abs(entry.logprob - expected[position, entry.token_id])
        for position, entry in enumerate(output.prompt_logprobs[1:])
        if entry is not None
    ]
    return float(max(differences) / np.ptp(reference.logits))


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault, (names, _) in FAULTS.items() for name in names])
def test_a_planted_fault_is_noticed(fault: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES_BY_NAME[name]
    model, change = find_model(case.config), FAULTS[fault][1]
    directory = write_checkpoint(case, tmp_path)
    wrong = replace(model, read_fields=lambda reader: change(model.read_fields(reader)))
    monkeypatch.setattr(registry, "MODELS", {model.architecture: wrong})
    assert deviation(case, directory) > 3 * TOLERANCE


@pytest.mark.parametrize("name", ["bloom-six-heads", "mpt-scaled", "baichuan-13b", "falcon-alibi"])
def test_alibi_slopes_counted_from_a_ranks_first_head_are_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-DeepSpeed#227, flashinfer#1606, #5101: two ranks of three heads, the second with the first's slopes."""
    case = CASES_BY_NAME[name]
    module = __import__(find_model(case.config).read_fields.__module__, fromlist=["alibi_slopes"])
    directory = write_checkpoint(case, tmp_path)
    monkeypatch.setattr(module, "alibi_slopes", lambda heads, *rest: 2 * alibi_slopes(heads, *rest)[: heads // 2])
    assert deviation(case, directory, tp=2) > 3 * TOLERANCE


@pytest.mark.parametrize("name", ["phi-plain", "gpt_neox-parallel", "nemotron-biases"])
def test_a_bias_that_every_rank_adds_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """litgpt#1663."""
    from phalanx.runtime.executors.numpy.ops import NumpyOps

    case = CASES_BY_NAME[name]
    directory, add_bias = write_checkpoint(case, tmp_path), NumpyOps.add_bias
    monkeypatch.setattr(NumpyOps, "add_bias", lambda ops, x, name: add_bias(ops, add_bias(ops, x, name), name))
    assert deviation(case, directory, tp=2) > 3 * TOLERANCE


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (0, 0, 0, 0)),
        ({"use_sliding_window": False}, (0, 0, 0, 0)),
        ({"use_sliding_window": True}, (0, 0, 6, 6)),
        ({"use_sliding_window": True, "max_window_layers": 4}, (0, 0, 0, 0)),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, (0, 0, 0, 6)),
    ],
)
def test_qwens_sliding_window_alone_means_no_window(fields: dict[str, Any], windows: tuple[int, ...]) -> None:
    """vllm#15705, #17306; transformers#35896, #40126; lmdeploy#3614."""
    raw = CASES_BY_NAME["qwen2-plain"].config | {"num_hidden_layers": 4, "sliding_window": 6, "max_window_layers": 2}
    assert find_model(raw).read_config({**raw, **fields}).windows == windows


@pytest.mark.parametrize("name", ["qwen2-plain", "smollm3-plain"])
def test_layer_types_cannot_ask_for_a_window_that_the_model_does_not_have(name: str) -> None:
    """transformers fails on such files, or masks by them, family by family."""
    raw = CASES_BY_NAME[name].config | {"use_sliding_window": False, "sliding_window": 6}
    raw["layer_types"] = ["full_attention", *["sliding_attention"] * (raw["num_hidden_layers"] - 1)]
    with pytest.raises(ConfigError, match=r"layer_types .* has sliding_attention, but there is no window"):
        find_model(raw).read_config(raw)


@pytest.mark.parametrize(
    ("fields", "num_kv_heads"),
    [
        ({"multi_query": True, "num_kv_heads": 3}, 1),
        ({"multi_query": False, "num_kv_heads": 3}, 6),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, 3),
        ({"new_decoder_architecture": True, "num_kv_heads": 3, "multi_query": True}, 3),
    ],
)
def test_falcons_key_value_heads_count_only_in_its_new_architecture(fields: dict[str, Any], num_kv_heads: int) -> None:
    """vllm#321, #1164; lmdeploy#582."""
    raw = CASES_BY_NAME["falcon-one-kv-head"].config
    assert find_model(raw).read_config({**raw, **fields}).num_kv_heads == num_kv_heads


@pytest.mark.parametrize("tp", [2, 4])
def test_padding_of_the_vocabulary_never_wins(tp: int, tmp_path: Path) -> None:
    """mirage#751, tt-metal#47021: padded rows give logits of 0, which here is above all others."""
    case = CASES_BY_NAME["gptj-plain"]
    directory = write_checkpoint(case, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.bias": tensors["lm_head.bias"] - 100}, directory / "model.safetensors")

    def rank(comm: Communicator) -> tuple[int, ...]:
        with LLM(directory, tensor_parallel_size=tp, comm=comm, engine="numpy") as llm:
            params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            return llm.generate([prompt_token_ids(case)], params)[0].token_ids

    assert run_ranks(tp, rank)[0] == load_reference(case).greedy[:8]


def test_the_first_chatglm_is_not_read_as_the_second() -> None:
    raw = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": 64, "num_layers": 2,
        "num_attention_heads": 4, "inner_hidden_size": 256, "max_sequence_length": 2048, "vocab_size": 130528,
        "position_encoding_2d": True, "layernorm_epsilon": 1e-05,
    }  # fmt: skip
    first = find_model(raw)
    assert first.read_config(raw).prefix_end == (150001, 150004)
    second = find_model({"architectures": ["ChatGLMModel"], "padded_vocab_size": 65024})
    assert (first.architecture, second.architecture) == ("ChatGLMForConditionalGeneration", "ChatGLMModel")
    with pytest.raises(ConfigError, match="quantization_bit=4"):
        first.read_config({**raw, "quantization_bit": 4})
