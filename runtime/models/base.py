"""What a model family provides, and the declarations that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.hf_config import ConfigReader

__all__ = ["Model", "feed_forward_shard", "head_shard", "kv_head_shard", "lm_head", "token_table", "vocabulary_shard"]


@dataclass(frozen=True, slots=True)
class Model:
    """A family: three functions over `Ops`, and the weights that they name.

    ``embed(ops, config) -> x``; ``block(ops, config, layer, x, residual) -> (x, residual)``;
    ``head(ops, config, x, residual) -> logits``. The residual is None before the first block; between pipeline stages the
    executor hands over ``x + residual``. Weight functions take the same arguments less the tensors.

    Attributes:
        architecture: the name that ``architectures`` in ``config.json`` gives the family.
        read_fields: make a `ModelConfig` from the fields of ``config.json``; every key that matters is read from the reader, or
            it is refused.
        model_type: the family's ``model_type``, by which it is found where ``architectures`` is missing.
        other_names: further spellings of ``architecture``, e.g. the base model without LM head.
        ignored_tensors: regular expressions (full match) of checkpoint tensors that carry no information here.
    """

    architecture: str
    read_fields: Callable[[ConfigReader], ModelConfig]
    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    embed_weights: Callable[[ModelConfig], list[WeightSpec]]
    block_weights: Callable[[ModelConfig, int], list[WeightSpec]]
    head_weights: Callable[[ModelConfig], list[WeightSpec]]
    ignored_tensors: tuple[str, ...] = ()
    model_type: str = ""
    other_names: tuple[str, ...] = ()

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed ``config.json``.

        Raises:
            ConfigError: a field is missing, malformed or out of range, or asks for something that the family does not have.
        """
        reader = ConfigReader(raw)
        config = self.read_fields(reader)
        reader.finish(self.architecture)
        return config

    def weights(
        self, config: ModelConfig, layers: range | None = None, first: bool = True, last: bool = True
    ) -> list[WeightSpec]:
        """Specs of a pipeline stage: the blocks in ``layers`` (None = all), the embedding if ``first``, the head if ``last``."""
        layers = range(config.num_layers) if layers is None else layers
        specs = self.embed_weights(config) if first else []
        for layer in layers:
            specs += self.block_weights(config, layer)
        return specs + (self.head_weights(config) if last else [])


def vocabulary_shard() -> Shard:
    """Rows of an embedding or LM head, padded with zeros so that any number of ranks works."""
    return Shard(axis=0, pad_to=16, what="vocabulary rows")


def token_table(config: ModelConfig, source: str, head: str = "lm_head.weight") -> Part:
    """Token rows ``[V, D]``; with tied embeddings some checkpoints keep them under the name of the LM head alone."""
    aliases = (head,) if config.tie_embeddings else ()
    return Part(source, (config.vocab_size, config.hidden_size), vocabulary_shard(), aliases)


def lm_head(config: ModelConfig, table: str, head: str = "lm_head.weight") -> WeightSpec:
    """LM head ``[V, D]``: the token table ``table`` itself where they are tied, else a matrix of its own."""
    if config.tie_embeddings:
        return WeightSpec("lm_head.weight", (token_table(config, table, head),))
    return WeightSpec("lm_head.weight", (Part(head, (config.vocab_size, config.hidden_size), vocabulary_shard()),))


def head_shard(config: ModelConfig, axis: int) -> Shard:
    """Query heads along ``axis``: outputs of q (0), inputs of o (1)."""
    return Shard(axis, unit=config.head_dim, groups=config.num_kv_heads, what="query heads")


def kv_head_shard(config: ModelConfig) -> Shard:
    """Key/value heads along the outputs of k and v."""
    return Shard(0, unit=config.head_dim, groups=config.num_kv_heads, copy=True, what="key/value heads")


def feed_forward_shard(config: ModelConfig, axis: int) -> Shard:
    """Feed-forward columns in units that keep 16-byte rows on a GPU where the size allows it."""
    unit = next(unit for unit in (16, 8, 4, 2, 1) if config.intermediate_size % unit == 0)
    return Shard(axis, unit=unit, what="feed-forward units")


def qkv_weight(config: ModelConfig, name: str, sources: tuple[str, str, str], bias: bool) -> list[WeightSpec]:
    """Separate q, k, v matrices of a checkpoint as one matrix (and bias): ``[(H + 2K) C, D]``."""
    q, kv = head_shard(config, 0), kv_head_shard(config)
    rows = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shards = (q, kv, kv)

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        return tuple(
            Part(f"{source}.{kind}", (n, *tail), shard) for source, n, shard in zip(sources, rows, shards, strict=True)
        )

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])
