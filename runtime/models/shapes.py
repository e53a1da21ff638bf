"""A model's functions run on shapes alone: what a model uses, before a weight is read or an executor exists."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import Activation, ModelConfig
from phalanx.runtime.models.base import Model
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec, Ops

__all__ = ["Feature", "ModelUse", "Shape", "ShapeOps", "use_of"]


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that an executor must have: an operation, or a value of one of its options.

    Attributes:
        name: ``rms_norm``, ``rms_norm.weight_offset``, ``attention.rope.interleaved``, ...
        value: of the option; None for the operation itself.
    """

    name: str
    value: Any = None


@dataclass(slots=True)
class ModelUse:
    """What a model's functions use.

    Attributes:
        features: each once, in the order of first use.
        weights: names of weights, in that order.
        attention: spec of each attention by its name.
        experts: spec of each mixture of experts by its name.
    """

    features: dict[Feature, None] = field(default_factory=dict)
    weights: dict[str, None] = field(default_factory=dict)
    attention: dict[str, AttentionSpec] = field(default_factory=dict)
    experts: dict[str, ExpertsSpec] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor ``[T, width]``; ``is_partial`` until it has been summed over the tensor-parallel ranks."""

    width: int
    is_partial: bool = False


class ShapeOps(Ops[Shape]):
    """Operations on shapes; records into ``use``.

    Args:
        declared: shapes of the weights that the model declares, by name.

    Raises:
        ConfigError: a weight is not declared or does not fit, or a sum over ranks is missing or done twice.
    """

    def __init__(self, declared: Mapping[str, tuple[int, ...]]) -> None:
        self._declared = declared
        self.use = ModelUse()

    def embedding(self, name: str, scale: float = 1.0) -> Shape:
        self._record("embedding", scale=scale)
        return Shape(self._weight(f"{name}.weight")[1])

    def position_embedding(self, x: Shape, name: str) -> Shape:
        self._record("position_embedding")
        self._take(x, self._weight(f"{name}.weight")[1], name)
        return x

    def rms_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        self._record("rms_norm", weight_offset=weight_offset)
        self._take(x, self._weight(f"{name}.weight")[0], name)
        return x

    def layer_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        self._record("layer_norm", weight_offset=weight_offset)
        self._take(x, self._weight(f"{name}.weight")[0], name)
        self._bias(x, name)
        return x

    def column_linear(self, x: Shape, name: str) -> Shape:
        self._record("column_linear")
        return self._product(x, name)

    def row_linear_partial(self, x: Shape, name: str) -> Shape:
        self._record("row_linear_partial")
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name)
        return Shape(rows, is_partial=True)

    def add_bias(self, x: Shape, name: str) -> Shape:
        self._record("add_bias")
        self._bias(x, name)
        return x

    def all_reduce(self, x: Shape) -> Shape:
        self._record("all_reduce")
        if not x.is_partial:
            raise ConfigError("the model sums a tensor over ranks that is not a partial product; its family is wrong")
        return Shape(x.width)

    def add(self, x: Shape, y: Shape) -> Shape:
        self._record("add")
        if x != y:
            raise ConfigError(f"the model adds {x} and {y}; its family is wrong")
        return x

    def scale(self, x: Shape, factor: float) -> Shape:
        self._record("scale")
        return x

    def clip(self, x: Shape, limit: float) -> Shape:
        self._record("clip")
        self._take(x, x.width, "a clip")
        return x

    def activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("activation", kind=kind)
        self._take(x, x.width, "an activation")
        return x

    def gated_activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("gated_activation", kind=kind)
        self._take(x, x.width, "an activation")
        return Shape(x.width // 2)

    def attention(self, qkv: Shape, name: str, layer: int, spec: AttentionSpec) -> Shape:
        self._record("attention", spec=spec)
        heads = spec.num_heads + 2 * spec.num_kv_heads if spec.keys == "own" else spec.num_heads
        self._take(qkv, heads * spec.head_dim, name)
        for side in ("query_norm", "key_norm") if spec.head_norm is not None else ():
            self._take(Shape(spec.head_dim), self._weight(f"{name}.{side}.weight")[-1], f"{name}.{side}")
        self.use.attention[name] = spec
        return Shape(spec.num_heads * spec.head_dim)

    def logits(self, x: Shape, name: str, soft_cap: float = 0.0) -> Shape:
        self._record("logits", soft_cap=soft_cap)
        return self._product(x, name)

    def experts(self, x: Shape, name: str, spec: ExpertsSpec) -> Shape:
        self._record("experts", spec=spec)
        self.use.experts[name] = spec
        self._product(x, f"{name}.router")
        gate_up, down = (self._weight(f"{name}.{kind}.weight") for kind in ("gate_up", "down"))
        self._take(x, gate_up[1], name)
        self._take(Shape(gate_up[0] // (2 * spec.num_experts)), down[1], name)
        return Shape(down[0] // spec.num_experts, is_partial=True)

    def sigmoid_gate(self, x: Shape, y: Shape, name: str) -> Shape:
        self._record("sigmoid_gate")
        _, columns = self._weight(f"{name}.weight")
        self._take(y, columns, name)
        return x

    def _record(self, operation: str, **options: Any) -> None:
        self.use.features[Feature(operation)] = None
        defaults = _defaults(operation)
        for option, value in options.items():
            if value == defaults[option]:
                continue
            # The one dataclass argument of an operation goes without its name: attention.window, not attention.spec.window.
            name = operation if dataclasses.is_dataclass(value) else f"{operation}.{option}"
            for feature in _features(name, value):
                self.use.features[feature] = None

    def _weight(self, name: str) -> tuple[int, ...]:
        if name not in self._declared:
            raise ConfigError(f"the model uses weight {name!r}, which its family does not declare")
        self.use.weights[name] = None
        return self._declared[name]

    def _bias(self, x: Shape, name: str) -> None:
        if f"{name}.bias" in self._declared:
            self._take(x, self._weight(f"{name}.bias")[0], name)

    def _product(self, x: Shape, name: str) -> Shape:
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name)
        self._bias(Shape(rows), name)
        return Shape(rows)

    def _take(self, x: Shape, width: int, name: str) -> None:
        if x.is_partial:
            raise ConfigError(f"{name} takes a product that was not summed over ranks; the model's family is wrong")
        if x.width != width:
            raise ConfigError(
                f"{name} takes {width} columns, but the tensor has {x.width}; the model's family is wrong"
            )


def use_of(model: Model, config: ModelConfig) -> ModelUse:
    """What all passes of a model use, over all layers.

    Raises:
        ConfigError: see `ShapeOps`; or a layer's attention is not the one that its family declares for it.
    """
    ops = ShapeOps({spec.name: _whole_shape(spec) for spec in model.weights(config)})
    declared: set[AttentionSpec] = set()
    for each in model.passes.values():
        x, residual = each.run(ops, config, each.layers(config))
        each.head(ops, config, x, residual)
        declared |= {spec for layer in each.layers(config) for spec in each.specs(config, layer)}
    if undeclared := set(ops.use.attention.values()) - declared:
        raise ConfigError(f"the model's layers use {undeclared.pop()}, which its family does not declare")
    return ops.use


def _features(name: str, value: Any) -> Iterator[Feature]:
    """A value, or of a dataclass every field that is not at its default."""
    if not dataclasses.is_dataclass(value):
        yield Feature(name, value)
        return
    for part in dataclasses.fields(value):
        inner = getattr(value, part.name)
        if part.default is not dataclasses.MISSING and inner == part.default:
            continue
        if dataclasses.is_dataclass(inner):
            yield Feature(f"{name}.{part.name}")
        yield from _features(f"{name}.{part.name}", inner)


@cache
def _defaults(operation: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(Ops, operation)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _whole_shape(spec: WeightSpec) -> tuple[int, ...]:
    return spec.local_shape(0, 1)
