"""Odd but legal configurations, at most two a family: those that implementations elsewhere have got wrong or never tried."""

from __future__ import annotations

from typing import Any

from .checkpoint_case import CheckpointCase

__all__ = ["ODD_CASES"]

_LAYOUTS = ((1, 1), (2, 2), (4, 1))
_THREE = ((1, 1), (2, 2), (3, 1))
"""Layouts of experts of three units."""
_SPECIAL = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
_LIKE_LLAMA = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip


def _case(family: str, architecture: str, name: str, layouts: Any = _LAYOUTS, **fields: Any) -> CheckpointCase:
    config = {"architectures": [architecture], "model_type": family, **_SPECIAL, **fields}
    given = {key: value for key, value in config.items() if value is not ...}
    return CheckpointCase(f"{family}-odd-{name}", given, layouts=layouts)


def _like_llama(family: str, architecture: str, name: str, **fields: Any) -> CheckpointCase:
    """A family that calls its fields what Llama does; a field that is ... is left out."""
    return _case(family, architecture, name, **{**_LIKE_LLAMA, **fields})


def _like_gpt2(family: str, architecture: str, name: str, **fields: Any) -> CheckpointCase:
    return _case(family, architecture, name, **{"n_layer": 3, "n_head": 4, "n_positions": 128, **fields})


_NEOX = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
}
_OPT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "ffn_dim": 100,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_FALCON = {"hidden_size": 64, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
_MPT = {"d_model": 64, "n_heads": 8, "n_layers": 3, "max_seq_len": 128, "no_bias": True}
_CHATGLM = {
    "padded_vocab_size": 101, "vocab_size": 97, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4, "kv_channels": 16,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 96, "seq_length": 128, "layernorm_epsilon": 1e-5,
    "add_bias_linear": False, "add_qkv_bias": True, "rmsnorm": True, "post_layer_norm": True,
}  # fmt: skip
_MOE = {"head_dim": 16, "num_experts": 6, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": []}

ODD_CASES = (
    _like_gpt2("gptj", "GPTJForCausalLM", "tied", n_embd=64, rotary_dim=16, n_inner=88, tie_word_embeddings=True),
    _case("gpt_neox", "GPTNeoXForCausalLM", "six-of-24-rotated", hidden_act="gelu_fast", rotary_pct=0.25, rotary_emb_base=5000, tie_word_embeddings=False, **_NEOX),
    _case("opt", "OPTForCausalLM", "no-weights-of-norms", enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu", **_OPT),
    _case("bloom", "BloomForCausalLM", "eight-heads", n_embed=64, n_layer=3, num_attention_heads=8, seq_length=128),
    _case("falcon", "FalconForCausalLM", "eight-heads-alibi", num_hidden_layers=3, num_attention_heads=8, **_FALCON),
    _case("falcon", "RWForCausalLM", "old-keys", n_layer=3, n_head=8, **_FALCON),
    _case("mpt", "MPTForCausalLM", "scaled-logits", expansion_ratio=2, logit_scale="inv_sqrt_d_model", attn_config={"alibi": True, "alibi_bias_max": 16, "clip_qkv": None}, **_MPT),
    _like_gpt2("gpt_bigcode", "GPTBigCodeForCausalLM", "own-keys-tied", n_embd=48, n_inner=96, activation_function="gelu_pytorch_tanh", multi_query=False),
    _like_llama("starcoder2", "Starcoder2ForCausalLM", "own-keys", sliding_window=None, use_bias=False, tie_word_embeddings=False, num_key_value_heads=4, norm_epsilon=1e-5, rope_theta=1e5, rms_norm_eps=...),
    _like_llama("gemma2", "Gemma2ForCausalLM", "small-caps", head_dim=16, sliding_window=4, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    _like_llama("gemma3_text", "Gemma3ForCausalLM", "five-layers", head_dim=16, num_hidden_layers=5, sliding_window=4, sliding_window_pattern=3, query_pre_attn_scalar=24, rope_theta=1e6, rope_local_base_freq=1e4),
    _like_llama("mistral", "MistralForCausalLM", "wide-heads", sliding_window=None, head_dim=24, rope_theta=1e6),
    _like_llama("mistral", "MistralForCausalLM", "window-absent"),
    _like_llama(
        "ministral", "MinistralForCausalLM", "windows-by-layer", sliding_window=5, head_dim=24,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    _like_llama("qwen2", "Qwen2ForCausalLM", "windows-tied", use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True),
    _like_llama("qwen3", "Qwen3ForCausalLM", "six-narrow-heads", head_dim=8, attention_bias=True, num_attention_heads=6, tie_word_embeddings=True),
    _like_llama("mixtral", "MixtralForCausalLM", "three-of-eight", num_local_experts=8, num_experts_per_tok=3, sliding_window=5),
    _like_llama("qwen2_moe", "Qwen2MoeForCausalLM", "every-second-renormalised", layouts=_THREE, num_experts_per_tok=2, shared_expert_intermediate_size=48, qkv_bias=True, **{**_MOE, "norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": ...}),
    _like_llama("qwen3_moe", "Qwen3MoeForCausalLM", "narrow-experts", layouts=_THREE, num_experts_per_tok=3, norm_topk_prob=True, **_MOE),
    _like_llama("phi", "PhiForCausalLM", "head-norms", hidden_size=80, partial_rotary_factor=0.4, qk_layernorm=True, layer_norm_eps=1e-5, rms_norm_eps=...),
    _like_llama("phi3", "Phi3ForCausalLM", "half-rotated-tied", sliding_window=None, partial_rotary_factor=0.5, tie_word_embeddings=True, hidden_size=64),
    _like_llama("glm", "GlmForCausalLM", "epsilon-absent", head_dim=16, attention_bias=True, rms_norm_eps=...),
    _like_llama("glm4", "Glm4ForCausalLM", "biases-epsilon-absent", head_dim=16, attention_bias=True, rms_norm_eps=...),
    _like_llama("cohere", "CohereForCausalLM", "small-scale", layer_norm_eps=1e-5, logit_scale=0.0625, use_qk_norm=False, num_key_value_heads=4, rms_norm_eps=...),
    _like_llama("cohere2", "Cohere2ForCausalLM", "twelve-wide-heads", layer_norm_eps=1e-5, logit_scale=0.25, sliding_window=4, sliding_window_pattern=3, head_dim=12, rms_norm_eps=...),
    _like_llama("nemotron", "NemotronForCausalLM", "own-keys", norm_eps=1e-5, hidden_act="relu2", num_key_value_heads=4, rms_norm_eps=...),
    _like_llama("internlm2", "InternLM2ForCausalLM", "dynamic", bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}),
    _case("chatglm", "ChatGLMModel", "padded-vocabulary", **_CHATGLM),
    _case("chatglm", "ChatGLMModel", "by-head", **{**_CHATGLM, "multi_query_attention": False}),
)  # fmt: skip
