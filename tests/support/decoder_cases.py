"""Small odd configurations of the decoders that call their fields as each other's or Llama's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .checkpoint_case import CheckpointCase

__all__ = ["DECODERS"]

TWO_KV_HEADS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""Each axis, both, and more ranks than key/value heads."""
SIX_HEADS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1))
"""Layouts of six heads that each have their own keys."""

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


FEW = ((1, 1), (2, 3), (4, 1))
"""Layouts of a family's further configurations."""


def _case(family: str, architecture: str, name: str, layouts: Any = TWO_KV_HEADS, **fields: Any) -> CheckpointCase:
    """A family that calls its dimensions what Llama does; a field that is ... is left out."""
    config = {
        "architectures": [architecture], "model_type": family, "vocab_size": 101, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
        "max_position_embeddings": 128, **_SPECIAL, **fields,
    }  # fmt: skip
    given = {key: value for key, value in config.items() if value is not ...}
    return CheckpointCase(f"{family.removesuffix('_text')}-{name}", given, layouts=layouts)


def _mpt(name: str, **attention: Any) -> CheckpointCase:
    config = {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "vocab_size": 101, "d_model": 96, "n_heads": 6,
        "n_layers": 3, "max_seq_len": 128, "attn_config": attention, **_SPECIAL,
    }  # fmt: skip
    return CheckpointCase(f"mpt-{name}", config, layouts=SIX_HEADS)


def _chatglm(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": 101, "vocab_size": 101,
        "hidden_size": 48, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 16, "multi_query_attention": True,
        "multi_query_group_num": 2, "ffn_hidden_size": 80, "seq_length": 128, "layernorm_epsilon": 1e-5,
        "add_bias_linear": False, "add_qkv_bias": True, **_SPECIAL, **fields,
    }  # fmt: skip
    return CheckpointCase(f"chatglm-{name}", config, layouts=TWO_KV_HEADS)


_CHATGLM1 = CheckpointCase(
    "chatglm1-prefix",
    {
        "architectures": ["ChatGLMForConditionalGeneration"], "model_type": "chatglm", "vocab_size": 101, "hidden_size": 96,
        "num_layers": 3, "num_attention_heads": 6, "inner_hidden_size": 120, "max_sequence_length": 128,
        "position_encoding_2d": True, "layernorm_epsilon": 1e-5, "mask_token_id": 3, "pad_token_id": 3, **_SPECIAL,
        "gmask_token_id": 0, "tie_word_embeddings": False,
    },
    layouts=SIX_HEADS,
    prefix_end=(0, 1),
)  # fmt: skip


def _qwen(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 101, "hidden_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 6, "kv_channels": 16, "intermediate_size": 160,
        "seq_length": 128, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True, **_SPECIAL, **fields,
    }  # fmt: skip
    return CheckpointCase(f"qwen-{name}", config, layouts=SIX_HEADS)


def _megatron(name: str, layouts: Any = TWO_KV_HEADS, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["MegatronGPTModel"], "model_type": "megatron_gpt", "vocab_size": 101, "hidden_size": 64,
        "num_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 96, "max_position_embeddings": 128, **_SPECIAL,
        **fields,
    }  # fmt: skip
    return CheckpointCase(f"megatron-{name}", config, layouts=layouts)


def _baichuan(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 101, "hidden_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 80, **_SPECIAL, **fields,
    }  # fmt: skip
    return CheckpointCase(f"baichuan-{name}", config, layouts=SIX_HEADS)


_LONGROPE = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * index for index in range(6)],
    "long_factor": [2.0 + 1.5 * index for index in range(6)],
}  # fmt: skip

_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _qwen_moe(number: int, name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": [f"Qwen{number}MoeForCausalLM"], "model_type": f"qwen{number}_moe", "vocab_size": 101,
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "max_position_embeddings": 128, **_SPECIAL,
    }  # fmt: skip
    return CheckpointCase(f"qwen{number}_moe-{name}", {**config, **fields}, layouts=TWO_KV_HEADS)


DECODERS = (
    _qwen_moe(2, "one-dense-layer", shared_expert_intermediate_size=96, mlp_only_layers=[1]),
    _qwen_moe(
        2, "renormalised-every-second", shared_expert_intermediate_size=64, decoder_sparse_step=2, norm_topk_prob=True,
        qkv_bias=False, use_sliding_window=True, sliding_window=6, max_window_layers=3,
    ),
    _qwen_moe(3, "plain", norm_topk_prob=True, num_experts_per_tok=3, tie_word_embeddings=True),
    _qwen_moe(3, "not-renormalised", attention_bias=True, use_sliding_window=True, sliding_window=6),
    _mpt("scaled", softmax_scale=0.2),
    _mpt("flat-biases", alibi_bias_max=4, alibi=True),
    _mpt("clipped", clip_qkv=0.8),
    _baichuan("7b", max_position_embeddings=128),
    _baichuan("13b", model_max_length=128),
    _megatron("gpt3"),
    _megatron(
        "rope", FEW, position_embedding_type="rope", rotary_percent=0.5, activation_function="gelu",
        normalization="LayerNorm1P", untie_embeddings_and_output_weights=True,
    ),
    _megatron(
        "llama", FEW, position_embedding_type="rope", rotary_base=5000.0, gated_linear_unit=True, num_query_groups=2,
        activation_function="silu", normalization="RMSNorm", add_bias_linear=False, add_qkv_bias=True,
        untie_embeddings_and_output_weights=True,
    ),
    _case("cohere", "CohereForCausalLM", "head-norms", logit_scale=0.25, use_qk_norm=True, pad_token_id=0, rope_theta=1e4),
    _case(
        "cohere", "CohereForCausalLM", "plain", FEW, num_key_value_heads=..., tie_word_embeddings=False, pad_token_id=0,
        attention_bias=True,
    ),
    _case(
        "cohere2", "Cohere2ForCausalLM", "windows", logit_scale=0.25, sliding_window=4, sliding_window_pattern=3,
        pad_token_id=0,
    ),
    _case("nemotron", "NemotronForCausalLM", "plain", head_dim=24, norm_eps=1e-5),
    _case(
        "nemotron", "NemotronForCausalLM", "biases", FEW, attention_bias=True, mlp_bias=True, hidden_act="silu",
        partial_rotary_factor=1.0, tie_word_embeddings=True,
    ),
    _case(
        "granite", "GraniteForCausalLM", "factors", embedding_multiplier=3.0, residual_multiplier=0.4,
        attention_multiplier=0.1, logits_scaling=0.5, mlp_bias=True,
    ),
    _case("stablelm", "StableLmForCausalLM", "serial", use_qkv_bias=True),
    _case(
        "stablelm", "StableLmForCausalLM", "head-norms", use_parallel_residual=True, qk_layernorm=True,
        num_attention_heads=6, hidden_size=96, num_key_value_heads=3, layouts=((1, 1), (2, 1), (1, 2), (3, 1), (5, 1)),
    ),
    _case("stablelm", "StableLmForCausalLM", "parallel", FEW, use_parallel_residual=True, partial_rotary_factor=0.5),
    _case(
        "gemma3_text", "Gemma3ForCausalLM", "windows", num_hidden_layers=4, head_dim=16, sliding_window=5,
        sliding_window_pattern=3, query_pre_attn_scalar=24, rope_theta=1e6, rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    _case(
        "gemma3_text", "Gemma3ForCausalLM", "version-5-spelling", FEW, head_dim=16, sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"], query_pre_attn_scalar=16,
        rope_parameters=_GEMMA3_ROPE,
    ),
    CheckpointCase(
        "mistral3-text",
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", **_SPECIAL,
            "image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
            "spatial_merge_size": 2, "vision_feature_layer": -1, "tie_word_embeddings": False,
            "text_config": {
                "model_type": "mistral", "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 24,
                "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "sliding_window": None,
                "rope_theta": 1e9, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
            },
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 1, "head_dim": 16, "image_size": 28, "patch_size": 14,
            },
        },
    ),
    CheckpointCase(
        "gemma3_multimodal-windows",
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 2],
            "torch_dtype": "float32", "mm_tokens_per_image": 4, "image_token_index": 100,
            "text_config": {
                "model_type": "gemma3_text", "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 80,
                "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                "image_size": 28, "patch_size": 14,
            },
        },
        layouts=FEW,
    ),
    _case("phi3", "Phi3ForCausalLM", "window", sliding_window=5, pad_token_id=0),
    _case(
        "phi3", "Phi3ForCausalLM", "partial", FEW, partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0,
        hidden_size=96, num_attention_heads=4, num_key_value_heads=4,
    ),
    _case(
        "phi3", "Phi3ForCausalLM", "longrope-short", FEW, rope_scaling=_LONGROPE, original_max_position_embeddings=64,
        partial_rotary_factor=0.75, pad_token_id=0,
    ),
    replace(
        _case(
            "phi3", "Phi3ForCausalLM", "longrope-long", FEW, rope_scaling=_LONGROPE, partial_rotary_factor=0.75,
            original_max_position_embeddings=8, pad_token_id=0,
        ),
        max_model_len=100,
    ),
    _case("internlm2", "InternLM2ForCausalLM", "plain", bias=False, num_attention_heads=8, hidden_size=128),
    _case("internlm2", "InternLM2ForCausalLM", "biases", FEW, num_key_value_heads=1, rope_scaling={"type": "dynamic", "factor": 2.0}),
    _case("glm", "GlmForCausalLM", "plain", head_dim=16, rope_theta=1e4, pad_token_id=0),
    _case(
        "glm", "GlmForCausalLM", "no-bias", FEW, head_dim=24, attention_bias=False, partial_rotary_factor=1.0,
        num_key_value_heads=..., pad_token_id=0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    _case("glm4", "Glm4ForCausalLM", "plain", head_dim=16, attention_bias=False, pad_token_id=0),
    _chatglm("groups", rope_ratio=50),
    _chatglm("own-keys", multi_query_attention=False, add_bias_linear=True),
    _CHATGLM1,
    _qwen("plain"),
    _case("smollm3", "SmolLM3ForCausalLM", "plain", num_hidden_layers=4, pad_token_id=0),
    _case(
        "smollm3", "SmolLM3ForCausalLM", "windows", FEW, no_rope_layers=[1, 0, 0], use_sliding_window=True,
        sliding_window=5, attention_bias=True, tie_word_embeddings=False, pad_token_id=0,
    ),
)  # fmt: skip
