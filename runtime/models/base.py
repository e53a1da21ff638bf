# SPDX-License-Identifier: Apache-2.0
"""What a model family provides: passes over `Ops`, what their layers are, and the weights that they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard, stage_layers
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = [
    "Block",
    "Embed",
    "Family",
    "Head",
    "Model",
    "Pass",
    "all_layers",
    "feed_forward_shard",
    "head_shard",
    "kv_head_shard",
    "lm_head",
    "token_table",
    "vocabulary_shard",
]

Config = TypeVar("Config", bound=ModelConfig)
_Config = TypeVar("_Config", bound=ModelConfig, contravariant=True)


class Embed(Protocol[_Config]):
    """What enters the first layer: ``[T, D]``."""

    def __call__(self, ops: Ops[Tensor], config: _Config, /) -> Tensor:
        """Compute it from the step's tokens."""
        ...


class Block(Protocol[_Config]):
    """One layer. ``residual`` is None before a stage's first layer; what is returned enters the next layer."""

    def __call__(
        self, ops: Ops[Tensor], config: _Config, layer: int, x: Tensor, residual: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """``(x, residual)``, each ``[T, D]``; their sum is the layer's output (``x`` alone without a residual)."""
        ...


class Head(Protocol[_Config]):
    """What leaves the last layer: logits ``[B, V local]``, or final hidden states ``[T, D]``."""

    def __call__(self, ops: Ops[Tensor], config: _Config, x: Tensor, residual: Tensor | None, /) -> Tensor:
        """Compute it from the last layer's ``(x, residual)``."""
        ...


def all_layers(config: ModelConfig) -> range:
    """The layers of a model with one pass."""
    return range(config.num_layers)


@dataclass(frozen=True)  # without slots: Python 3.11 cannot build a parametrised class that has them
class Pass(Generic[Config]):
    """One way through a model that a step can take, with the declarations that belong to each function.

    Layers are numbered over all passes of a model (an encoder's first, then the decoder's), so pipeline stages divide one
    chain and a layer's number names its weights and its cache.

    Attributes:
        embed, block, head: functions over `Ops`; ``embed_weights``, ``block_weights`` and ``head_weights`` declare exactly
            the weights that they use.
        attention: what a layer's attention is.
        cross_attention: what a layer's second attention is, whose keys come from an encoder; None = there is none.
        layers: the numbers of this pass's layers.
        output: what ``head`` returns.
    """

    embed: Embed[Config]
    block: Block[Config]
    head: Head[Config]
    embed_weights: Callable[[Config], list[WeightSpec]]
    block_weights: Callable[[Config, int], list[WeightSpec]]
    head_weights: Callable[[Config], list[WeightSpec]]
    attention: Callable[[Config, int], AttentionSpec]
    cross_attention: Callable[[Config, int], AttentionSpec] | None = None
    layers: Callable[[Config], range] = all_layers
    output: Literal["logits", "hidden"] = "logits"

    def run(
        self, ops: Ops[Tensor], config: Config, layers: range, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run a pipeline stage's ``layers``; returns ``(x, residual)`` of the last.

        ``x``: what the previous stage handed over, its residual added in; None = this stage embeds the tokens.
        """
        hidden = self.embed(ops, config) if x is None else x
        residual: Tensor | None = None
        for layer in layers:
            hidden, residual = self.block(ops, config, layer, hidden, residual)
        return hidden, residual

    def specs(self, config: Config, layer: int) -> tuple[AttentionSpec, ...]:
        """Every attention of a layer."""
        cross = () if self.cross_attention is None else (self.cross_attention(config, layer),)
        return (self.attention(config, layer), *cross)

    def weights(self, config: Config, layers: range, first: bool, last: bool) -> list[WeightSpec]:
        """Weights of the stage that holds ``layers`` of the chain, ``first`` if it starts the chain, ``last`` if it ends it."""
        own = self.layers(config)
        embeds = first if own.start == 0 else own.start in layers
        ends = last if own.stop == config.num_layers else own.stop - 1 in layers
        specs = self.embed_weights(config) if embeds else []
        for layer in layers:
            specs += self.block_weights(config, layer) if layer in own else []
        return specs + (self.head_weights(config) if ends else [])


@dataclass(frozen=True)  # without slots: Python 3.11 cannot build a parametrised class that has them
class Family(Generic[Config]):
    """A model family: how its ``config.json`` is read, and its passes.

    Attributes:
        architecture: the name that ``architectures`` in ``config.json`` gives the family.
        read_fields: make a configuration from the fields of ``config.json``; every key that matters is read from the reader,
            or it is refused.
        passes: ``decode`` of a decoder; ``encode`` and ``decode`` of an encoder-decoder; ``encode`` of an encoder.
        model_type: the family's ``model_type``, by which it is found where ``architectures`` is missing.
        other_names: further spellings of ``architecture``, e.g. the base model without LM head.
        ignored_tensors: regular expressions (full match) of checkpoint tensors that carry no information here.
        code: SHA-256 of the file that defines the family; empty for built-in ones.
        told_by: keys of ``config.json``, of which one must be there where another family has the same name; empty = none has.
    """

    architecture: str
    read_fields: Callable[[ConfigReader], Config]
    passes: Mapping[str, Pass[Config]]
    ignored_tensors: tuple[str, ...] = ()
    model_type: str = ""
    other_names: tuple[str, ...] = ()
    code: str = ""
    told_by: tuple[str, ...] = ()

    def read_config(self, raw: Mapping[str, Any]) -> Config:
        """Read a parsed ``config.json``.

        Raises:
            ConfigError: a field is missing, malformed or out of range, or asks for something that the family does not have.
        """
        reader = ConfigReader(raw)
        config = self.read_fields(reader)
        reader.finish(self.architecture)
        return config

    def stages(self, config: Config, num_stages: int) -> tuple[range, ...]:
        """Layers of each pipeline stage: the only place where they are divided.

        A layer costs what its matrices weigh, which is what a decoding step reads and multiplies; so does the head (2.4 layers of
        Llama-3-8B). The embedding is looked up and costs nothing.

        Raises:
            ConfigError: a stage would have no layer.
        """
        passes = self.passes.values()
        owners = {layer: each for each in passes for layer in each.layers(config)}
        costs = [_num_weights(owners[layer].block_weights(config, layer)) for layer in range(config.num_layers)]
        last = owners[config.num_layers - 1]
        return stage_layers(costs, _num_weights(last.head_weights(config)), num_stages)

    @property
    def decode(self) -> Pass[Config]:
        """The pass that gives a sequence its next token; executors refuse models without one before they use it."""
        return self.passes["decode"]

    def weights(
        self, config: Config, layers: range | None = None, first: bool = True, last: bool = True
    ) -> list[WeightSpec]:
        """Specs of a pipeline stage: the blocks in ``layers`` (None = all), the embedding if ``first``, the head if ``last``.

        A weight that two passes use is listed once.
        """
        layers = range(config.num_layers) if layers is None else layers
        specs = [spec for each in self.passes.values() for spec in each.weights(config, layers, first, last)]
        return list(dict.fromkeys(specs))


def _num_weights(specs: Iterable[WeightSpec]) -> int:
    """Elements of all matrices; vectors take no time."""
    return sum(math.prod(spec.local_shape(0, 1)) for spec in specs if len(spec.local_shape(0, 1)) > 1)


Model: TypeAlias = Family[Any]
"""A family whose configuration's type is its own matter: what everything outside ``models`` handles."""


def vocabulary_shard() -> Shard:
    """Rows of an embedding or LM head, padded with zeros so that any number of ranks works."""
    return Shard(axis=0, pad_to=16, what="vocabulary rows")


def token_table(config: ModelConfig, source: str, head: str = "lm_head.weight") -> Part:
    """Token rows ``[V, D]``; with tied embeddings some checkpoints keep them under the name of the LM head alone."""
    aliases = (head,) if config.tie_embeddings else ()
    return Part(source, (config.vocab_size, config.hidden_size), vocabulary_shard(), aliases)


def lm_head(config: ModelConfig, table: str, head: str = "lm_head.weight") -> WeightSpec:
    """LM head ``[V, D]``: the token table ``table`` itself where they are tied, else a separate matrix."""
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
    return Shard(axis, unit=unit, what=f"feed-forward units of {unit}")
