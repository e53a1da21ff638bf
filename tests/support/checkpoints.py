"""Small random checkpoints in Hugging Face layout, made with NumPy from a seed: the same on every machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .checkpoint_case import CheckpointCase
from .decoder_cases import DECODERS
from .odd_cases import ODD_CASES

__all__ = ["ARCEE", "CASES", "CASES_BY_NAME", "OLMO", "CheckpointCase", "write_checkpoint"]

_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _llama(name: str, dtype: str = "float32", **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 101, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 88,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
    return CheckpointCase(f"llama-{name}", {**config, **fields}, dtype)


def _gpt2(name: str, dtype: str = "float32", **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3,
        "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
    return CheckpointCase(f"gpt2-{name}", {**config, **fields}, dtype)


def _gemma(name: str, dtype: str = "float32", **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 113, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24,
        "intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
    return CheckpointCase(f"gemma-{name}", {**config, **fields}, dtype)


_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def _like_llama(family: str, architecture: str, name: str, **fields: Any) -> CheckpointCase:
    """A family that calls its dimensions what Llama does."""
    config = {
        "architectures": [architecture], "model_type": family, "vocab_size": 101, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "head_dim": 16,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"{family}-{name}", {**config, **fields})


def _neox(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 101, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128,
        "hidden_act": "gelu", "rotary_pct": 0.25, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"gpt_neox-{name}", {**config, **fields})


def _gptj(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "vocab_size": 107, "n_embd": 64, "n_layer": 3,
        "n_head": 4, "n_positions": 128, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"gptj-{name}", {**config, **fields})


def _bloom(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 103, "hidden_size": 64,
        "n_layer": 3, "n_head": 4, "seq_length": 128, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"bloom-{name}", {**config, **fields})


def _opt(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 101, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 100, "max_position_embeddings": 128,
        "bos_token_id": 2, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"opt-{name}", {**config, **fields}, layouts=_BOTH)


def _falcon(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": 101, "hidden_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 6, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"falcon-{name}", {**config, **fields}, layouts=_BOTH)


def _bigcode(name: str, **fields: Any) -> CheckpointCase:
    config = {
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "vocab_size": 101, "n_embd": 64,
        "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip
    return CheckpointCase(f"gpt_bigcode-{name}", {**config, **fields}, layouts=_BOTH)


_BOTH = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""Each axis, both, and more ranks than some have key/value heads."""

_THREE = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1))
"""Layouts of six heads that each have their own keys."""

_FEW = ((1, 1), (2, 3), (4, 1))
"""Layouts of the second and third configuration of a family."""

_WITHOUT_TP4 = tuple((tp, pp) for tp in (1, 2) for pp in (1, 2, 3))
"""Layouts of six heads that each have their own keys, which four ranks cannot share."""

CASES = (
    _llama("plain"),
    _llama("grouped-heads", num_key_value_heads=2, num_attention_heads=6, head_dim=16),
    _llama("one-kv-head-tied", num_key_value_heads=1, tie_word_embeddings=True, intermediate_size=89),
    _llama("biases-llama3-rope", attention_bias=True, mlp_bias=True, rope_scaling=_LLAMA3_ROPE),
    _llama("linear-rope", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    _llama("yarn-rope", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    _llama("bfloat16", "bfloat16", num_key_value_heads=2),
    _gpt2("plain"),
    _gpt2("untied-odd-width", n_embd=60, n_inner=91, tie_word_embeddings=False, vocab_size=127),
    _gpt2("float16", "float16"),
    replace(_gpt2("divided-by-layer", scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False), layouts=_FEW),
    _gemma("one-kv-head"),
    _gemma("several-kv-heads", num_key_value_heads=4, head_dim=16, vocab_size=131, intermediate_size=90),
    _gemma("wide-heads-bfloat16", "bfloat16", head_dim=256),
    _like_llama("mistral", "MistralForCausalLM", "window", sliding_window=7),
    replace(
        _like_llama("mistral", "MistralForCausalLM", "no-window", sliding_window=None, num_key_value_heads=1),
        layouts=_FEW,
    ),
    _like_llama(
        "gemma2",
        "Gemma2ForCausalLM",
        "caps",
        sliding_window=5,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    replace(
        _like_llama(
            "gemma2", "Gemma2ForCausalLM", "no-caps", attn_logit_softcapping=None, final_logit_softcapping=None
        ),
        layouts=_FEW,
    ),
    replace(_like_llama("qwen2", "Qwen2ForCausalLM", "plain", tie_word_embeddings=True, hidden_size=64), layouts=_BOTH),
    replace(
        _like_llama(
            "qwen2",
            "Qwen2ForCausalLM",
            "windows",
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
            hidden_size=64,
        ),
        layouts=_FEW,
    ),
    _like_llama("qwen3", "Qwen3ForCausalLM", "plain", tie_word_embeddings=True),
    _like_llama(
        "qwen3",
        "Qwen3ForCausalLM",
        "windows",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        attention_bias=True,
    ),
    _like_llama("mixtral", "MixtralForCausalLM", "plain", num_local_experts=5, num_experts_per_tok=2),
    _neox("parallel"),
    replace(
        _neox(
            "serial-no-bias", use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast", rotary_pct=1.0
        ),
        layouts=_FEW,
    ),
    _gptj("plain"),
    replace(_gptj("all-rotary", rotary_dim=16, n_inner=80), layouts=_FEW),
    _bloom("plain"),
    replace(_bloom("six-heads", n_head=6, hidden_size=96, tie_word_embeddings=False), layouts=_WITHOUT_TP4),
    _opt("plain"),
    replace(
        _opt("narrow-norm-last", do_layer_norm_before=False, word_embed_proj_dim=32, tie_word_embeddings=False),
        layouts=_FEW,
    ),
    replace(_opt("no-bias", enable_bias=False, activation_function="gelu"), layouts=_FEW),
    _falcon("one-kv-head"),
    _falcon("two-norms", new_decoder_architecture=True, num_kv_heads=2),
    replace(
        _falcon("one-norm", new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1),
        layouts=((1, 1), (1, 2), (3, 1)),
    ),
    replace(
        _falcon("alibi", multi_query=False, parallel_attn=False, bias=True, alibi=True, ffn_hidden_size=104),
        layouts=_THREE,
    ),
    _bigcode("one-kv-head"),
    replace(_bigcode("own-keys", multi_query=False, scale_attn_weights=False), layouts=_FEW),
    replace(_like_llama("starcoder2", "Starcoder2ForCausalLM", "window", sliding_window=6), layouts=_BOTH),
    replace(
        _like_llama("starcoder2", "Starcoder2ForCausalLM", "no-bias", use_bias=False, tie_word_embeddings=False),
        layouts=_FEW,
    ),
    replace(_like_llama("phi", "PhiForCausalLM", "plain", hidden_size=64), layouts=_BOTH),
    replace(
        _like_llama(
            "phi",
            "PhiForCausalLM",
            "own-keys",
            hidden_size=80,
            head_dim=20,
            num_key_value_heads=4,
            partial_rotary_factor=0.4,
        ),
        layouts=_FEW,
    ),
    *DECODERS,
    *ODD_CASES,
)
ARCEE = replace(
    _like_llama("arcee", "ArceeForCausalLM", "user-file", pad_token_id=0),
    model_file=Path(__file__).resolve().parents[2] / "examples" / "arcee.py",
)
"""A family that is not built in."""
OLMO = replace(
    _like_llama("olmo", "OlmoForCausalLM", "user-file", clip_qkv=0.9, pad_token_id=0),
    model_file=Path(__file__).resolve().parents[2] / "examples" / "olmo.py",
)
"""Another, whose norms have no weights."""
CASES_BY_NAME = {case.name: case for case in CASES}


def write_checkpoint(case: CheckpointCase, directory: Path, seed: int = 0) -> Path:
    """Write ``config.json`` and ``model.safetensors``; returns ``directory``."""
    from phalanx.runtime.models import find_model
    from phalanx.runtime.models.user_file import model_from_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case.config))
    model = find_model(case.config, model_from_file(case.model_file))
    parts = {part.source: part for spec in model.weights(model.read_config(case.config)) for part in spec.parts}
    random = np.random.default_rng(seed)
    tensors = {name: _values(name, part.stored_shape, random) for name, part in sorted(parts.items())}
    save_file(
        {name: value.astype(_STORED[case.dtype]) for name, value in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Magnitudes that give logits some range, so that a wrong term shows."""
    if len(shape) == 1:
        centre = 1.0 if name.endswith("weight") and "gemma" not in name else 0.0
        return random.normal(centre, 0.2, shape)
    return random.normal(0.0, 1.4 / np.sqrt(min(shape)), shape)
