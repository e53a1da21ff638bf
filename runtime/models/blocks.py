"""Pieces of blocks that families share; what is peculiar to a family stays in its own file."""

from __future__ import annotations

from phalanx.runtime.config import Activation
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["attention", "gated_mlp", "mlp"]


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
