"""``launch.tune`` without a GPU: which products it would time, and what it refuses."""

import subprocess
import sys

import pytest

from phalanx.launch.tune import gemm_problems
from phalanx.runtime.models.registry import find_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "vocab_size": 96, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip


def shapes(raw, tp, tokens=(1,)):
    model = find_model(raw)
    problems = gemm_problems(model, model.read_config(raw), tp, "bfloat16", tokens)
    return [(p.num_tokens, p.out_features, p.in_features, p.has_bias) for p in problems]


def test_one_block_and_the_head_are_timed_once_for_each_number_of_tokens():
    expected = [(96, 64), (64, 64), (192, 64), (64, 96)]
    assert [(o, i) for _, o, i, _ in shapes(LLAMA, 1)][:4] == expected
    assert len(shapes(LLAMA, 1)) == 5
    assert [t for t, *_ in shapes(LLAMA, 1, (1, 64))] == [1, 64] * 5


def test_shapes_are_those_of_one_tensor_parallel_rank():
    assert [(o, i) for _, o, i, _ in shapes(LLAMA, 2)][:4] == [(48, 64), (64, 32), (96, 64), (64, 48)]


def test_a_row_parallel_bias_is_in_the_product_only_without_tensor_parallelism():
    alone = {(o, i): has_bias for _, o, i, has_bias in shapes(GPT2, 1)}
    split = {(o, i): has_bias for _, o, i, has_bias in shapes(GPT2, 2)}
    assert alone[192, 64]
    assert alone[64, 256]
    assert split[96, 64]
    assert not split[64, 128]


def test_experts_are_not_timed():
    mixtral = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    assert [(o, i) for _, o, i, _ in shapes(mixtral, 1)] == [(96, 64), (64, 64), (112, 64)]


@pytest.mark.parametrize("tokens", ["", "1,x", "0", "-3,4"])
def test_a_wrong_list_of_tokens_is_the_users_mistake(tokens):
    command = [sys.executable, "-m", "launch.tune", "--model=somewhere", f"--tokens={tokens}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "is not a list of positive numbers" in result.stderr
    assert result.stderr.count("\n") == 1
