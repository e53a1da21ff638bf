"""Random small configurations of families that transformers has: legal values of every field that the family reads, absent ones too."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "sample"]

Fields = Mapping[str, tuple[Any, ...]]
"""Values that a key may have; it is absent as often as not."""

_BIASES: Fields = {"attention_bias": (True, False)}
_TIED: Fields = {"tie_word_embeddings": (True, False)}
_ROTATES = ("default", "linear", "llama3", "yarn")
_QWEN: Fields = {
    **_TIED, "use_sliding_window": (True, False), "sliding_window": (5, 9), "max_window_layers": (0, 1, 2, 28),
}  # fmt: skip
_QWEN_MOE: Fields = {
    **_QWEN, "num_experts": (6, 8), "num_experts_per_tok": (1, 2, 3), "moe_intermediate_size": (48, 64, 80),
    "norm_topk_prob": (True, False), "decoder_sparse_step": (1, 2), "mlp_only_layers": ([], [0], [1]),
}  # fmt: skip
_GEMMA2: Fields = {
    **_BIASES, "sliding_window": (4, 7), "query_pre_attn_scalar": (16, 24, 144), "final_logit_softcapping": (5.0, None),
    "tie_word_embeddings": (True, False),
}  # fmt: skip
_GLM: Fields = {**_BIASES, "rms_norm_eps": (1e-5,), "pad_token_id": (0,)}

FAMILIES: Mapping[str, tuple[str, Fields, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", {**_BIASES, **_TIED, "mlp_bias": (True, False), "hidden_act": ("silu", "gelu", "relu")}, _ROTATES),
    "mistral": ("MistralForCausalLM", {**_TIED, "sliding_window": (5, 9, None)}, _ROTATES),
    "mixtral": ("MixtralForCausalLM", {"sliding_window": (5, None), "num_local_experts": (3, 5), "num_experts_per_tok": (1, 2, 3)}, ("default", "linear")),
    "qwen2": ("Qwen2ForCausalLM", _QWEN, _ROTATES),
    "qwen3": ("Qwen3ForCausalLM", {**_QWEN, **_BIASES, "head_dim": (8, 24)}, _ROTATES),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_QWEN_MOE, "qkv_bias": (True, False), "shared_expert_intermediate_size": (48, 64)}, _ROTATES),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_QWEN_MOE, **_BIASES}, _ROTATES),
    "gemma": ("GemmaForCausalLM", {**_BIASES, "hidden_act": ("gelu", "gelu_pytorch_tanh"), "head_dim": (16, 24)}, _ROTATES),
    "gemma2": ("Gemma2ForCausalLM", {**_GEMMA2, "attn_logit_softcapping": (2.0, 50.0, None), "head_dim": (16, 24)}, _ROTATES),
    "gemma3_text": ("Gemma3ForCausalLM", {**_GEMMA2, "sliding_window_pattern": (2, 3, 6), "rope_local_base_freq": (1e4, 2e4), "head_dim": (16, 24)}, ("default", "linear")),
    "phi": ("PhiForCausalLM", {"num_key_value_heads": (None,), "layer_norm_eps": (1e-5, 1e-6), "partial_rotary_factor": (0.25, 0.75)}, ("default", "linear")),
    "phi3": ("Phi3ForCausalLM", {**_TIED, "sliding_window": (5, 2047, None), "partial_rotary_factor": (0.5, 0.75)}, ("default",)),
    "starcoder2": ("Starcoder2ForCausalLM", {**_TIED, "sliding_window": (5, None), "use_bias": (True, False)}, _ROTATES),
    "stablelm": ("StableLmForCausalLM", {"use_qkv_bias": (True, False), "use_parallel_residual": (True, False), "qk_layernorm": (True, False)}, ("default", "linear")),
    "cohere": ("CohereForCausalLM", {**_BIASES, **_TIED, "logit_scale": (0.25, 1.0), "use_qk_norm": (True, False)}, _ROTATES),
    "cohere2": ("Cohere2ForCausalLM", {**_BIASES, "logit_scale": (0.25,), "sliding_window": (4, 7), "sliding_window_pattern": (2, 3)}, ("default", "linear")),
    "nemotron": ("NemotronForCausalLM", {**_BIASES, "mlp_bias": (True, False), "partial_rotary_factor": (0.25, 1.0)}, ("default", "linear")),
    "granite": ("GraniteForCausalLM", {**_BIASES, "embedding_multiplier": (12.0,), "residual_multiplier": (0.22,), "attention_multiplier": (0.1,), "logits_scaling": (8.0, 0.5)}, _ROTATES),
    "smollm3": ("SmolLM3ForCausalLM", {**_TIED, "no_rope_layer_interval": (2, 3), "use_sliding_window": (True, False), "sliding_window": (5, 9)}, _ROTATES),
    "glm": ("GlmForCausalLM", {**_GLM, "head_dim": (16, 24)}, ("default", "linear")),
    "glm4": ("Glm4ForCausalLM", {**_GLM, "head_dim": (16, 24)}, ("default", "linear")),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_BIASES, "use_parallel_residual": (True, False), "rotary_pct": (0.25, 1.0), "hidden_act": ("gelu_fast",)}, ()),
    "gpt2": ("GPT2LMHeadModel", {**_TIED, "n_inner": (33, 40), "activation_function": ("relu", "gelu"), "scale_attn_weights": (False,), "scale_attn_by_inverse_layer_idx": (True,)}, ()),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"n_inner": (33, 40), "multi_query": (True, False), "scale_attn_weights": (False,)}, ()),
    "gptj": ("GPTJForCausalLM", {"n_inner": (33, 40), "rotary_dim": (4, 8), "activation_function": ("gelu",)}, ()),
}  # fmt: skip
"""By ``model_type``: the class, its own fields, and the kinds of rotary embedding that it is tried with."""
_ALWAYS = frozenset(
    {"head_dim", "rotary_dim", "pad_token_id", "num_experts", "num_experts_per_tok", "moe_intermediate_size"}
)
"""Keys without which the defaults are too large for a test, or transformers fails."""
_SCALING: Mapping[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


def sample(model_type: str, seed: int) -> dict[str, Any]:
    """A ``config.json`` of a family, the same for a seed: odd vocabularies, few or one key/value head, old and new spellings."""
    draw = random.Random(f"{model_type} {seed}")
    architecture, fields, kinds = FAMILIES[model_type]
    config = {"architectures": [architecture], "model_type": model_type, **_sizes(model_type, draw)}
    config |= {name: draw.choice(values) for name, values in fields.items() if name in _ALWAYS or draw.random() < 0.5}
    if kinds:
        _add_rotary(config, draw.choice(kinds), draw)
    if model_type in ("phi3", "cohere", "cohere2", "smollm3"):
        config["pad_token_id"] = 0
    return config | {"bos_token_id": 1, "eos_token_id": 2, draw.choice(("dtype", "torch_dtype")): "float32"}


def _sizes(model_type: str, draw: random.Random) -> dict[str, Any]:
    heads, head_dim = draw.choice((1, 2, 3, 4, 6)), draw.choice((8, 16, 24))
    sizes = {
        "vocab_size": draw.choice((61, 97, 128, 257)), "hidden_size": heads * head_dim, "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads, "max_position_embeddings": 128,
    }  # fmt: skip
    if model_type in ("gpt2", "gpt_bigcode", "gptj"):
        return {_GPT2_NAMES.get(name, name): value for name, value in sizes.items()}
    sizes["intermediate_size"] = draw.choice((40, 64, 80))
    if model_type != "gpt_neox":
        sizes["num_key_value_heads"] = draw.choice([number for number in (1, 2, 3, 6) if heads % number == 0])
    return sizes


def _add_rotary(config: dict[str, Any], kind: str, draw: random.Random) -> None:
    """A base and a kind of scaling, as transformers 4 or 5 spells them."""
    theta, is_gemma3 = draw.choice((1e4, 5e5)), config["model_type"] == "gemma3_text"
    if draw.random() < 0.5 and not is_gemma3:  # which would take parameters for each kind of layer
        share = {name: config.pop(name) for name in ("partial_rotary_factor",) if name in config}
        config["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **_SCALING.get(kind, {}), **share}
        return
    config["rope_theta"] = theta
    if kind != "default":  # transformers 5 reads the older name of its type everywhere but in Gemma 3
        spelling = "rope_type" if is_gemma3 else draw.choice(("type", "rope_type"))
        config["rope_scaling"] = {spelling: kind, **_SCALING[kind]}
