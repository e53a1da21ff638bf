# SPDX-License-Identifier: Apache-2.0
"""NeMo's GPT checkpoints: a ``.nemo`` archive, or the directory that it was unpacked into; or the directory of NeMo 2.

It holds ``model_config.yaml`` and ``model_weights.ckpt``, or one of these for each rank below ``mp_rank_00`` or
``tp_rank_00_pp_rank_000``, or a distributed checkpoint in ``model_weights``. Members of the archive are read where they lie; nothing is unpacked.

Source: ``nemo/collections/nlp/parts/nlp_overrides.py`` (names) and the ``megatron_gpt`` models (keys) of NeMo 1.x.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.conversion.distributed import distributed_folder, read_distributed
from phalanx.checkpoints.conversion.files import Files, opened
from phalanx.checkpoints.conversion.megatron import MegatronLayout, refuse_arguments
from phalanx.checkpoints.conversion.megatron_files import (
    INTERLEAVED,
    by_stage,
    join_stages,
    refuse_interleaved,
    whole_model,
)
from phalanx.checkpoints.conversion.nemo2 import CONTEXT, arguments_of_context
from phalanx.checkpoints.conversion.torch_file import array_of, read_torch_file
from phalanx.checkpoints.conversion.whole import WholeModel
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["read_nemo"]

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_PLACE = re.compile(rf"(?:(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/)?{re.escape(WEIGHTS)}")
_MOST_CONFIG_BYTES = 1 << 20
_REFUSED = {
    "transformer_block_type": "pre_ln", "headscale": False, "num_moe_experts": None, "megatron_legacy": False,
    "seq_len_interpolation_factor": None, "apply_rope_scaling": False, "scale_positional_embedding": False, "qk_layernorm": False,
    "normalize_attention_scores": True, "sliding_window": None, "window_size": None, "mcore_customization_config": None,
    "apply_embedding_scaling": False, "peft": None, "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
"""Keys that must be absent or have this value."""
_ACTIVATIONS = {
    "gelu": "gelu", "openai-gelu": "gelu_pytorch_tanh", "quick-gelu": None, "swiglu": "silu", "fast-swiglu": "silu",
    "squared-relu": "relu2",
}  # fmt: skip
_POSITIONS = ("learned_absolute", "rope")
_NORMS = {"layernorm": "LayerNorm", "layernorm1p": "LayerNorm1P", "rmsnorm": "RMSNorm"}


def read_nemo(path: Path, vocab_size: int) -> WholeModel:
    """Join the pieces of a ``.nemo`` file or directory. ``vocab_size``: rows to keep of the vocabulary; 0 = all.

    Raises:
        ConfigError: a file is missing, or the model is of a kind that is not supported.
        CheckpointError: a file is damaged, or the archive holds a link or a name that leads out of it.
    """
    with opened(path) as files:
        is_second = CONTEXT in files.names()
        arguments = (
            arguments_of_context(_yaml(files, CONTEXT, path)) if is_second else arguments_of(_read_config(files, path))
        )
        if (folder := distributed_folder(files)) is not None:
            return whole_model(read_distributed(files, folder, vocab_size), arguments)
        if is_second:
            raise ConfigError(f"{path} holds no distributed checkpoint in weights/; restore it")
        refuse_interleaved(arguments)
        heads = arguments["num_attention_heads"]
        layout = MegatronLayout(3.0, heads, arguments["num_query_groups"], arguments["swiglu"], vocab_size)
        stages = by_stage(_places(files, path), f"{WEIGHTS} in {path}")
        pieces = ([_piece(files, name) for name in ranks] for ranks in stages)
        return whole_model(join_stages(pieces, layout), arguments)


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments that ``model_config.yaml`` stands for.

    Raises:
        ConfigError: a key asks for something that the family does not have.
    """
    for key, value in _REFUSED.items():
        if config.get(key) not in (None, value):
            raise ConfigError(f"{key}={config[key]!r} in {CONFIG} is not supported; only {value!r} is")
    refuse_arguments(config)
    kind, norm = config.get("activation", "gelu"), config.get("normalization", "layernorm")
    activation = _ACTIVATIONS.get(kind)
    if activation is None or norm not in _NORMS:
        key, value = ("activation", kind) if activation is None else ("normalization", norm)
        known = (name for name, meant in (_ACTIVATIONS if activation is None else _NORMS).items() if meant)
        raise ConfigError(f"{key}={value!r} in {CONFIG} is not supported; supported: {', '.join(known)}")
    positions = config.get("position_embedding_type", "learned_absolute")
    if positions not in _POSITIONS:
        raise ConfigError(
            f"position_embedding_type={positions!r} in {CONFIG} is not supported; supported: {', '.join(_POSITIONS)}"
        )
    bias, heads = config.get("bias", True), _whole(config, "num_attention_heads")
    is_fused = bias and config.get("bias_activation_fusion", config.get("bias_gelu_fusion", True))
    return {
        "hidden_size": _whole(config, "hidden_size"),
        "num_layers": _whole(config, "num_layers"),
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_query_groups") or heads,
        "group_query_attention": True,
        "kv_channels": config.get("kv_channels"),
        "ffn_hidden_size": _whole(config, "ffn_hidden_size"),
        "max_position_embeddings": _whole(config, "max_position_embeddings"),
        "layernorm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "normalization": "LayerNorm" if norm == "layernorm1p" else _NORMS[norm],
        "apply_layernorm_1p": norm == "layernorm1p",
        "position_embedding_type": positions,
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "rotary_base": config.get("rotary_base", 10000),
        "swiglu": activation == "silu",
        "squared_relu": activation == "relu2",
        # The kernel that adds the bias computes the tanh form.
        "bias_gelu_fusion": kind == "openai-gelu" or bool(config.get("openai_gelu")) or bool(is_fused),
        "add_bias_linear": bias,
        "add_qkv_bias": bool(config.get("qkv_bias", False)),
        INTERLEAVED: config.get(INTERLEAVED),
        "untie_embeddings_and_output_weights": not config.get("share_embeddings_and_output_weights", True),
    }


def _whole(config: Mapping[str, Any], key: str) -> int:
    """A number, which may be given as another key: ``${.encoder_seq_length}``."""
    value = given = config.get(key)
    if isinstance(value, str) and (other := re.fullmatch(r"\$\{(?:\.|model\.)?(\w+)\}", value)):
        value = config.get(other[1])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={given!r} in {CONFIG} is not a whole number above 0; the file is damaged")
    return value


def _piece(files: Files, name: str) -> dict[str, Any]:
    """One rank's tensors, under Megatron's names."""
    with files.open(name) as file:
        state: Mapping[str, Any] = read_torch_file(file, name)
    named = {key.removeprefix("model."): value for key, value in state.items()}
    gates = [key for key in named if ".mlp.dense_h_to_4h_2." in key]
    for key in gates:  # its product with the other's activation is taken: gate, then this half
        other = key.replace("dense_h_to_4h_2", "dense_h_to_4h")
        named[other] = np.concatenate([array_of(named[other]), array_of(named.pop(key))])
    return named


def _places(files: Files, path: Path) -> dict[tuple[int, int], str]:
    """Names of the ranks' weights by (pipeline stage, tensor-parallel rank)."""
    found = {}
    for name in files.names():
        if match := _PLACE.fullmatch(name):
            found[int(match[3] or 0), int(match[2] or match[1] or 0)] = name
    if not found:
        raise ConfigError(
            f"{path} holds no {WEIGHTS} and no distributed checkpoint in model_weights/; restore the weights, or give the .nemo file"
        )
    return found


def _read_config(files: Files, path: Path) -> dict[str, Any]:
    if CONFIG not in files.names():
        if any(name.startswith("context/") for name in files.names()):
            raise ConfigError(
                f"{path} is a checkpoint of NeMo 2 without {CONTEXT}; export it with its export_ckpt to Hugging Face's format"
            )
        raise ConfigError(f"{path} holds no {CONFIG}; give a .nemo file, or the directory that it was unpacked into")
    config = _yaml(files, CONFIG, path)
    inner = config.get("model")
    return inner if isinstance(inner, dict) else config


def _yaml(files: Files, name: str, path: Path) -> dict[str, Any]:
    import yaml

    with files.open(name) as file:
        text = file.read(_MOST_CONFIG_BYTES)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{name} of {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{name} of {path} is not a mapping; restore the file")
    return config
