# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint's network in PyTorch, for training only; parameters have Hugging Face's names."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """The extents of a Llama decoder; 7.38 million parameters as they stand."""

    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Norm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; `[B, T, D]` in and out."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = rotate(k, cos, sin).repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, dropout_p=dropout, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer; dropout falls on what each half adds to the residual stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape, dropout=0.0)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = FeedForward(shape)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Stack(nn.Module):
    """Embedding, blocks and last norm: what Hugging Face calls `model`."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)
        self.drop = nn.Dropout(dropout)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        num_tokens = token_ids.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        x = self.drop(self.embed_tokens(token_ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Decoder(nn.Module):
    """The whole network; `forward` gives the summed cross-entropy in nats over targets that are not -100."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.model = Stack(shape, dropout)
        residual_std = 0.02 / math.sqrt(2 * shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(
                    parameter,
                    std=residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02,
                )

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.model(token_ids), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100)


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, `[positions, head_dim]`, both halves alike (Su et al. 2021, half-split layout)."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_position_embeddings, dtype=torch.float64), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head by its position's angles; `[B, heads, T, head_dim]` in and out, dtype kept."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def round_to_bfloat16(decoder: Decoder) -> None:
    """Give every weight a value that bfloat16 holds; the rotary tables are no weights and stay float32."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def hugging_face_config(shape: Shape, bos_token_id: int, eos_token_id: int) -> dict[str, object]:
    """`config.json` of the checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def write_checkpoint(decoder: Decoder, shape: Shape, bos_token_id: int, eos_token_id: int, folder: Path) -> None:
    """Write config, generation config, and the weights as two bfloat16 shards with their index."""
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in decoder.state_dict().items()
    }
    total_size = sum(value.nbytes for value in weights.values())
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    filled = 0
    for name, value in weights.items():
        shards[0 if filled < total_size / 2 else 1][name] = value
        filled += value.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the writer leaves it to its owner alone
        weight_map.update(dict.fromkeys(shard, file))
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )
    _write_json(folder / "config.json", hugging_face_config(shape, bos_token_id, eos_token_id))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "do_sample": False},
    )


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
