"""Weight declarations that families share: how common parts are named, stacked and split."""

from __future__ import annotations

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import feed_forward_shard, head_shard, kv_head_shard

__all__ = ["column_linear", "gate_up", "norm", "qkv", "row_linear"]


def norm(name: str, source: str, size: int, bias: bool = False) -> list[WeightSpec]:
    """Weight, and with ``bias`` bias, of a norm over ``size``; the same on every rank."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [WeightSpec(f"{name}.{kind}", (Part(f"{source}.{kind}", (size,)),)) for kind in kinds]


def column_linear(name: str, source: str, shape: tuple[int, int], shard: Shard, bias: bool = False) -> list[WeightSpec]:
    """A matrix ``[out, in]`` split by outputs, its bias with it."""
    specs = [WeightSpec(f"{name}.weight", (Part(f"{source}.weight", shape, shard),))]
    return specs + ([WeightSpec(f"{name}.bias", (Part(f"{source}.bias", shape[:1], shard),))] if bias else [])


def row_linear(name: str, source: str, shape: tuple[int, int], shard: Shard, bias: bool = False) -> list[WeightSpec]:
    """A matrix ``[out, in]`` split by inputs; its bias, added after the sum, is whole on every rank."""
    specs = [WeightSpec(f"{name}.weight", (Part(f"{source}.weight", shape, shard),))]
    return specs + ([WeightSpec(f"{name}.bias", (Part(f"{source}.bias", shape[:1]),))] if bias else [])


def qkv(config: ModelConfig, name: str, sources: tuple[str, str, str], bias: bool = False) -> list[WeightSpec]:
    """Separate q, k, v matrices of a checkpoint as one matrix (and bias): ``[(H + 2K) C, D]``."""

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        layout = zip(sources, _qkv_rows(config), _qkv_shards(config), strict=True)
        return tuple(Part(f"{source}.{kind}", (rows, *tail), shard) for source, rows, shard in layout)

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def gate_up(config: ModelConfig, name: str, sources: tuple[str, str], bias: bool = False) -> list[WeightSpec]:
    """Gate and up matrices as one (and bias): ``[2F, D]``, gate first."""
    shard = feed_forward_shard(config, 0)

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        return tuple(Part(f"{source}.{kind}", (config.intermediate_size, *tail), shard) for source in sources)

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def _qkv_rows(config: ModelConfig) -> tuple[int, int, int]:
    keys = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, keys, keys


def _qkv_shards(config: ModelConfig) -> tuple[Shard, Shard, Shard]:
    return head_shard(config, 0), kv_head_shard(config), kv_head_shard(config)
