# SPDX-License-Identifier: Apache-2.0
"""Pieces of blocks that families share; what is peculiar to a family stays in its own file."""

from __future__ import annotations

from phalanx.runtime.config import Activation, ModelConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["attended", "attention", "gated_mlp", "mlp", "pre_norm", "sandwich"]


def attention(ops: Ops[Tensor], name: str, layer: int, x: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention and its output projection: ``[T, D] -> [T, D]``; weights ``<name>.qkv`` and ``<name>.output``."""
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear(x, f"{name}.output")


def mlp(ops: Ops[Tensor], name: str, x: Tensor, kind: Activation) -> Tensor:
    """Two matrices with an activation between them: ``[T, D] -> [T, D]``; weights ``<name>.up`` and ``<name>.down``."""
    return ops.row_linear(ops.activation(ops.column_linear(x, f"{name}.up"), kind), f"{name}.down")


def gated_mlp(ops: Ops[Tensor], name: str, x: Tensor, kind: Activation) -> Tensor:
    """Gated feed-forward part (Shazeer 2020): ``[T, D] -> [T, D]``; weights ``<name>.gate_up`` and ``<name>.down``."""
    return ops.row_linear(ops.gated_activation(ops.column_linear(x, f"{name}.gate_up"), kind), f"{name}.down")


def pre_norm(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Llama's block with another attention: RMSNorm before each half; weights ``<layer>.attention_norm``, ``.mlp_norm``."""
    x, residual = attended(ops, config, layer, x, residual, spec)
    return gated_mlp(ops, f"layers.{layer}", x, config.activation), residual


def attended(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`pre_norm` as far as its feed-forward part, for blocks with another one: what enters that part, and the residual."""
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = attention(ops, name, layer, x, spec)
    return ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)


def sandwich(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None, spec: AttentionSpec,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm before and after each half; the later ones' weights are ``<layer>.attention_post_norm``, ``.mlp_post_norm``."""
    name, eps = f"layers.{layer}", config.norm_eps
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", eps, weight_offset)
    x = ops.rms_norm(attention(ops, name, layer, x, spec), f"{name}.attention_post_norm", eps, weight_offset)
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", eps, weight_offset)
    x = gated_mlp(ops, name, x, config.activation)
    return ops.rms_norm(x, f"{name}.mlp_post_norm", eps, weight_offset), residual
