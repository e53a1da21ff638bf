"""What computes the expected values of a small checkpoint: transformers, put right or converted to where it has no such family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phalanx.runtime.models import baichuan

from .checkpoint_case import CheckpointCase

__all__ = ["load_oracle"]

Model = Any
"""A causal language model of transformers in evaluation mode."""


def load_oracle(case: CheckpointCase, directory: Path) -> Model:
    """Load the model of ``directory``, a written checkpoint, in float32."""
    load = _OF_ARCHITECTURE.get(case.config["architectures"][0], _load)
    return load(case, directory).eval()


def _load(case: CheckpointCase, directory: Path) -> Model:
    import torch
    from transformers import AutoModelForCausalLM

    # Some releases leave the soft caps of Gemma 2 out of SDPA.
    attention = "eager" if case.config.get("attn_logit_softcapping") else None
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)


def _with_images(case: CheckpointCase, directory: Path) -> Model:
    """A class that reads images, too, which is no causal language model to transformers."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)


def _first_falcon(case: CheckpointCase, directory: Path) -> Model:
    """transformers passes over the names that the first files have: it reads those of today."""
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    fields = {names.get(key, key): value for key, value in case.config.items()}
    (directory / "config.json").write_text(json.dumps(fields))
    return _load(case, directory)


def _mpt(case: CheckpointCase, directory: Path) -> Model:
    """transformers builds ALiBi with a bias of at most 8 and a feed-forward part of 4 D, and leaves logits unscaled, whatever the file
    says; llm-foundry, which trains, does not."""
    import torch
    from transformers import MptConfig, MptForCausalLM
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    c = case.config
    width, ratio, scale = c["d_model"], c.get("expansion_ratio", 4), c.get("logit_scale")
    model = MptForCausalLM(MptConfig(**_fields(c)))
    for block in model.transformer.blocks:
        block.ffn.up_proj = torch.nn.Linear(width, ratio * width, bias=False)
        block.ffn.down_proj = torch.nn.Linear(ratio * width, width, bias=False)
    tensors = _tensors(directory)
    _filled(model, {"lm_head.weight": tensors["transformer.wte.weight"], **tensors})
    bias_max = c["attn_config"].get("alibi_bias_max", 8)
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=bias_max)
    if scale is not None:
        factor = width**-0.5 if scale == "inv_sqrt_d_model" else scale
        model.transformer.norm_f.register_forward_hook(lambda module, inputs, output: output * factor)
    return model.eval()


def _internlm2(case: CheckpointCase, directory: Path) -> Model:
    """Llama, once the rows of each key/value head's group are apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = case.config
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    group, head_dim = heads // kv_heads, c["hidden_size"] // heads
    names = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
             "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "tok_embeddings": "embed_tokens", "output.weight": "lm_head.weight"}  # fmt: skip
    tensors = {}
    for name, value in _tensors(directory).items():
        if "wqkv" not in name:
            tensors[_renamed(name, names)] = value
            continue
        rows = value.reshape(kv_heads, group + 2, head_dim, *value.shape[1:])
        sides = (rows[:, :group], rows[:, group], rows[:, group + 1])
        for letter, side in zip("qkv", sides, strict=True):
            tensors[name.replace("attention.wqkv", f"self_attn.{letter}_proj")] = side.reshape(-1, *value.shape[1:])
    config = _fields(c, attention_bias=c.get("bias", True))
    if (config.get("rope_scaling") or {}).get("type") == "dynamic":  # equal up to the trained length
        del config["rope_scaling"]
    return _filled(LlamaForCausalLM(LlamaConfig(**config)), tensors)


def _chatglm(case: CheckpointCase, directory: Path) -> Model:
    """transformers' own GLM, which is made from such files by renaming."""
    from transformers import GlmConfig, GlmForCausalLM

    c = case.config
    heads, head_dim = c["num_attention_heads"], c["kv_channels"]
    groups = c["multi_query_group_num"] if c["multi_query_attention"] else heads
    names = {"transformer.encoder.": "model.", "transformer.embedding.word_embeddings": "model.embed_tokens",
             "transformer.output_layer": "lm_head", "self_attention.dense": "self_attn.o_proj",
             "mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
             "final_layernorm": "norm"}  # fmt: skip
    tensors = {}
    for name, value in _tensors(directory).items():
        if "query_key_value" not in name:
            tensors[_renamed(name, names)] = value
            continue
        if groups == heads:
            sides = value.reshape(heads, 3, head_dim, *value.shape[1:]).swapaxes(0, 1)
        else:
            sides = value.split([heads * head_dim, groups * head_dim, groups * head_dim])
        for letter, side in zip("qkv", sides, strict=True):
            new = _renamed(name, names).replace("self_attention.query_key_value", f"self_attn.{letter}_proj")
            tensors[new] = side.reshape(-1, *value.shape[1:])
    config = GlmConfig(
        vocab_size=c["padded_vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["ffn_hidden_size"],
        num_hidden_layers=c["num_layers"], num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim,
        rms_norm_eps=c["layernorm_epsilon"], rope_theta=10000.0 * c.get("rope_ratio", 1), pad_token_id=0,
        attention_bias=c["add_qkv_bias"] or c["add_bias_linear"], max_position_embeddings=c["seq_length"],
    )  # fmt: skip
    return _filled(GlmForCausalLM(config), tensors)


class _ChatGlm1:
    """The published forward pass of ChatGLM-6B in plain torch, whole sequences at once; no class of transformers has its block."""

    def __init__(self, case: CheckpointCase, directory: Path) -> None:
        self.config, self.tensors = case.config, {name: value.float() for name, value in _tensors(directory).items()}

    def eval(self) -> Model:
        return self

    def to(self, device: str) -> Model:
        self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        return self

    def __call__(self, token_ids: Any) -> Any:
        import torch

        c, (tokens,) = self.config, token_ids.tolist()
        context, mask_position = tokens.index(c["bos_token_id"]), tokens.index(c["gmask_token_id"])
        positions, block_positions = (torch.arange(len(tokens)) for _ in range(2))
        positions[context:] = mask_position
        block_positions = (block_positions - context + 1).clamp(min=0)
        visible = torch.ones(len(tokens), len(tokens)).tril().bool()
        visible[:, :context] = True
        x, alpha = self.tensors["transformer.word_embeddings.weight"][token_ids[0]], (2 * c["num_layers"]) ** 0.5
        for layer in range(c["num_layers"]):
            name = f"transformer.layers.{layer}"
            y = self._norm(x, f"{name}.input_layernorm")
            qkv = self._linear(y, f"{name}.attention.query_key_value").unflatten(-1, (c["num_attention_heads"], -1))
            q, k, v = qkv.transpose(0, 1).chunk(3, dim=-1)
            q, k = (
                torch.cat((_turned(a, positions), _turned(b, block_positions)), -1)
                for a, b in (q.chunk(2, -1), k.chunk(2, -1))
            )
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.device))
            x = alpha * y + self._linear(mixed.transpose(0, 1).flatten(1), f"{name}.attention.dense")
            y = self._norm(x, f"{name}.post_attention_layernorm")
            hidden = torch.nn.functional.gelu(self._linear(y, f"{name}.mlp.dense_h_to_4h"), approximate="tanh")
            x = alpha * y + self._linear(hidden, f"{name}.mlp.dense_4h_to_h")
        logits = self._norm(x, "transformer.final_layernorm") @ self.tensors["lm_head.weight"].T
        return SimpleNamespace(logits=logits[None])

    def _norm(self, x: Any, name: str) -> Any:
        import torch

        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.config["layernorm_epsilon"])

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]


def _turned(x: Any, positions: Any) -> Any:
    """``[H, T, C]`` rotated by halves, the base 10,000."""
    import torch

    half = x.shape[-1] // 2
    angles = positions[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _qwen(case: CheckpointCase, directory: Path) -> Model:
    """Qwen 2, which has the same block."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = {"transformer.h.": "model.layers.", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
             "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
             "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}  # fmt: skip
    tensors = {}
    for name, value in _tensors(directory).items():
        new = _renamed(name, names)
        if "c_attn" not in name:
            tensors[new] = value
            continue
        for letter, side in zip("qkv", value.chunk(3), strict=True):
            tensors[new.replace("attn.c_attn", f"self_attn.{letter}_proj")] = side
    c = case.config
    config = _fields(
        c,
        num_key_value_heads=c["num_attention_heads"],
        intermediate_size=c["intermediate_size"] // 2,
        rms_norm_eps=1e-6,
        rope_theta=float(c["rotary_emb_base"]),
    )
    return _filled(Qwen2ForCausalLM(Qwen2Config(**config)), tensors)


def _baichuan(case: CheckpointCase, directory: Path) -> Model:
    """Llama; without rotation, and ALiBi as a mask, for 13B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = {}
    for name, value in _tensors(directory).items():
        if "W_pack" not in name:
            tensors[name] = value
            continue
        for letter, side in zip("qkv", value.chunk(3), strict=True):
            tensors[name.replace("W_pack", f"{letter}_proj")] = side
    if case.config["vocab_size"] == baichuan.VOCAB_SIZE_OF_2:
        tensors["lm_head.weight"] /= tensors["lm_head.weight"].norm(dim=-1, keepdim=True)
    model = _filled(LlamaForCausalLM(LlamaConfig(**_fields(case.config), attn_implementation="eager")), tensors)
    if "max_position_embeddings" not in case.config:
        model.model.rotary_emb.inv_freq.zero_()
        model.forward = partial(_with_alibi, model.forward, case.config["num_attention_heads"])
    return model


def _megatron(case: CheckpointCase, directory: Path) -> Model:
    """GPT-2, the serial GPT-NeoX or Qwen 2, by the switches; each is a form of Megatron's block."""
    norm, rotates = case.config.get("normalization"), case.config.get("position_embedding_type") == "rope"
    tensors = {name.removeprefix("language_model."): value for name, value in _tensors(directory).items()}
    if norm == "RMSNorm":
        return _megatron_as_qwen2(case.config, tensors)
    if norm == "LayerNorm1P":
        tensors = {name: value + 1 if "norm.weight" in name else value for name, value in tensors.items()}
    return _megatron_as_neox(case.config, tensors) if rotates else _megatron_as_gpt2(case.config, tensors)


def _megatron_as_gpt2(c: Mapping[str, Any], tensors: dict[str, Any]) -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"encoder.layers": "transformer.h", "embedding.word_embeddings": "transformer.wte",
             "embedding.position_embeddings": "transformer.wpe", "encoder.final_layernorm": "transformer.ln_f",
             "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attention.query_key_value": "attn.c_attn",
             "self_attention.dense": "attn.c_proj", "dense_h_to_4h": "c_fc", "dense_4h_to_h": "c_proj"}  # fmt: skip
    heads, filled = c["num_attention_heads"], {}
    for name, value in tensors.items():
        rows = value
        if "query_key_value" in name:  # [H, 3, C] to [3, H, C]
            rows = value.reshape(heads, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        is_matrix = value.ndim == 2 and "embedding" not in name
        filled[_renamed(name, names)] = rows.T.contiguous() if is_matrix else rows
    filled["lm_head.weight"] = tensors["embedding.word_embeddings.weight"]
    config = GPT2Config(
        vocab_size=c["vocab_size"], n_embd=c["hidden_size"], n_layer=c["num_layers"], n_head=heads,
        n_inner=c["ffn_hidden_size"], n_positions=c["max_position_embeddings"], activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    return _filled(GPT2LMHeadModel(config), filled)


def _megatron_as_neox(c: Mapping[str, Any], tensors: dict[str, Any]) -> Model:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = {"encoder.layers": "gpt_neox.layers", "embedding.word_embeddings": "gpt_neox.embed_in",
             "encoder.final_layernorm": "gpt_neox.final_layer_norm", "output_layer": "lm_head",
             "self_attention": "attention"}  # fmt: skip
    config = GPTNeoXConfig(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_attention_heads"], intermediate_size=c["ffn_hidden_size"],
        max_position_embeddings=c["max_position_embeddings"], rotary_pct=c["rotary_percent"], hidden_act="gelu",
        use_parallel_residual=False, layer_norm_eps=1e-5,
    )  # fmt: skip
    return _filled(GPTNeoXForCausalLM(config), {_renamed(name, names): value for name, value in tensors.items()})


def _megatron_as_qwen2(c: Mapping[str, Any], tensors: dict[str, Any]) -> Model:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = {"encoder.layers": "model.layers", "embedding.word_embeddings": "model.embed_tokens",
             "encoder.final_layernorm": "model.norm", "output_layer": "lm_head", "self_attention.dense": "self_attn.o_proj",
             "dense_4h_to_h": "down_proj"}  # fmt: skip
    heads, groups, filled = c["num_attention_heads"], c["num_query_groups"], {}
    for name, value in tensors.items():
        new = _renamed(name, names)
        if "query_key_value" in name:
            rows = value.reshape(groups, heads // groups + 2, -1, *value.shape[1:])
            for letter, side in zip("qkv", (rows[:, :-2], rows[:, -2], rows[:, -1]), strict=True):
                place = new.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")
                filled[place] = side.reshape(-1, *value.shape[1:])
        elif "dense_h_to_4h" in name:
            for kind, side in zip(("gate", "up"), value.chunk(2), strict=True):
                filled[new.replace("dense_h_to_4h", f"{kind}_proj")] = side
        else:
            filled[new] = value
    config = Qwen2Config(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], num_hidden_layers=c["num_layers"],
        num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=c["ffn_hidden_size"],
        max_position_embeddings=c["max_position_embeddings"], rope_theta=c["rotary_base"], rms_norm_eps=1e-5,
    )  # fmt: skip
    return _filled(Qwen2ForCausalLM(config), filled)


def _with_alibi(forward: Callable[..., Any], heads: int, token_ids: Any) -> Any:
    mask = _alibi_mask(heads, token_ids.shape[1])
    return forward(token_ids, attention_mask=mask.to(token_ids.device))


def _alibi_mask(heads: int, length: int) -> Any:
    """``[1, H, T, T]``, by BLOOM's own slopes, which Baichuan shares."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # of the second key
    distance = torch.arange(length)[:, None] - torch.arange(length)
    biases = -slopes[:, None, None] * distance
    return biases.masked_fill(distance < 0, float("-inf"))[None]


def _tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _fields(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Those of a file, without what names its class."""
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type")} | changes


def _filled(model: Model, tensors: dict[str, Any]) -> Model:
    """``model`` in float32 with exactly these tensors, biases that its class has no switch for among them."""
    import torch

    for name in tensors.keys() - model.state_dict().keys():
        if name.endswith(".bias"):
            model.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(tensors[name])
    model.float().load_state_dict(tensors)
    return model


_OF_ARCHITECTURE: Mapping[str, Callable[[CheckpointCase, Path], Model]] = {
    "RWForCausalLM": _first_falcon,
    "MPTForCausalLM": _mpt,
    "Mistral3ForConditionalGeneration": _with_images,
    "InternLM2ForCausalLM": _internlm2,
    "ChatGLMModel": _chatglm,
    "ChatGLMForConditionalGeneration": _ChatGlm1,
    "QWenLMHeadModel": _qwen,
    "BaichuanForCausalLM": _baichuan,
    "MegatronGPTModel": _megatron,
}
