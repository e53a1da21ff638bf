"""A model's functions run on shapes alone: what a model uses, before a weight is read or an executor exists."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import Activation, ModelConfig
from phalanx.runtime.models.base import Model, Pass
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


Kind = Literal["whole", "split", "partial"]
"""What a rank holds of a tensor: all of it, a share of its columns, or a product that is still to be summed over ranks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor ``[T, width]`` over all ranks."""

    width: int
    kind: Kind = "whole"


class ShapeOps(Ops[Shape]):
    """Operations on shapes; records into ``use``.

    Args:
        declared: the weights that the model declares, by name.

    Raises:
        ConfigError: a weight is not declared, is not split as the operation needs it, or does not fit; or a sum over ranks
            is missing or done twice.
    """

    def __init__(self, declared: Mapping[str, WeightSpec]) -> None:
        self._declared = declared
        self.use = ModelUse()
        self.layer: int | None = None  # the one whose block runs; None = not known
        self.attended: set[str] = set()  # names of attentions of earlier layers

    @property
    def unused(self) -> str | None:
        """The first declared weight that no function has used; None if there is none."""
        return next((name for name in self._declared if name not in self.use.weights), None)

    def embedding(self, name: str, scale: float = 1.0) -> Shape:
        self._record("embedding", scale=scale)
        self._check_vocabulary(name)
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
        has_weight = f"{name}.weight" in self._declared
        self._take(x, self._weight(f"{name}.weight")[0] if has_weight else x.width, name)
        self._bias(x, name)
        return x

    def linear(self, x: Shape, name: str) -> Shape:
        self._record("column_linear")
        self._check_cut(name, None, "linear")
        return self._product(x, name)

    def column_linear(self, x: Shape, name: str) -> Shape:
        self._record("column_linear")
        self._check_cut(name, 0, "column_linear")
        return Shape(self._product(x, name).width, "split")

    def row_linear_partial(self, x: Shape, name: str) -> Shape:
        self._record("row_linear_partial")
        self._check_cut(name, 1, "row_linear")
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name, ("split",))
        return Shape(rows, "partial")

    def add_bias(self, x: Shape, name: str) -> Shape:
        self._record("add_bias")
        if x.kind == "partial":
            raise ConfigError(
                f"the bias of {name} is added to a partial product, once on each rank; call all_reduce first"
            )
        self._bias(x, name)
        return x

    def all_reduce(self, x: Shape) -> Shape:
        self._record("all_reduce")
        if x.kind != "partial":
            raise ConfigError(f"all_reduce sums a tensor that is {_WORDS[x.kind]}, no partial product; leave it out")
        return Shape(x.width)

    def add(self, x: Shape, y: Shape) -> Shape:
        self._record("add")
        if x.kind != y.kind:
            raise ConfigError(
                f"add takes a tensor that is {_WORDS[x.kind]} and one that is {_WORDS[y.kind]}; sum over ranks first"
            )
        if x.width != y.width:
            raise ConfigError(f"add takes tensors of {x.width} and {y.width} columns; they must be equal")
        return x

    def scale(self, x: Shape, factor: float) -> Shape:
        self._record("scale")
        return x

    def clip(self, x: Shape, limit: float) -> Shape:
        self._record("clip")
        self._take(x, x.width, "clip", _COMPLETE)
        return x

    def activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("activation", kind=kind)
        self._take(x, x.width, "an activation", _COMPLETE)
        return x

    def gated_activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("gated_activation", kind=kind)
        self._take(x, x.width, "an activation", _COMPLETE)
        if x.width % 2:
            raise ConfigError(f"gated_activation takes gate and up side by side, but the tensor has {x.width} columns")
        return Shape(x.width // 2, x.kind)

    def attention(self, qkv: Shape, name: str, layer: int, spec: AttentionSpec) -> Shape:
        self._record("attention", spec=spec)
        if self.layer not in (None, layer):
            raise ConfigError(f"{name} uses the cache of layer {layer}; pass the layer that the block is called for")
        heads = spec.num_heads + 2 * spec.num_kv_heads if spec.keys == "own" else spec.num_heads
        self._take(qkv, heads * spec.head_dim, name, ("split",))
        if spec.head_norm is not None:
            self._check_head_norms(spec, spec.head_norm, name)
        self.use.attention[name] = spec
        return Shape(spec.num_heads * spec.head_dim, "split")

    def logits(self, x: Shape, name: str, soft_cap: float = 0.0) -> Shape:
        self._record("logits", soft_cap=soft_cap)
        self._check_vocabulary(name)
        return Shape(self._product(x, name).width, "split")

    def experts(self, x: Shape, name: str, spec: ExpertsSpec) -> Shape:
        self._record("experts", spec=spec)
        self.use.experts[name] = spec
        self._product(x, f"{name}.router")
        gate_up, down = (self._weight(f"{name}.{kind}.weight") for kind in ("gate_up", "down"))
        self._take(x, gate_up[1], name)
        self._take(Shape(gate_up[0] // (2 * spec.num_experts)), down[1], name)
        return Shape(down[0] // spec.num_experts, "partial")

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
            raise ConfigError(f"uses weight {name!r}, which is not declared")
        self.use.weights[name] = None
        return self._declared[name].local_shape(0, 1)

    def _bias(self, x: Shape, name: str) -> None:
        if f"{name}.bias" in self._declared:
            self._take(x, self._weight(f"{name}.bias")[0], name, _COMPLETE)

    def _check_head_norms(self, spec: AttentionSpec, norm: HeadNorm, name: str) -> None:
        for side, heads in (("query_norm", spec.num_heads), ("key_norm", spec.num_kv_heads)):
            for kind in ("weight", "bias") if norm.has_bias else ("weight",):
                size = math.prod(self._weight(f"{name}.{side}.{kind}"))
                self._take(Shape(spec.head_dim * (heads if norm.own_weights else 1)), size, f"{name}.{side}")

    def _product(self, x: Shape, name: str) -> Shape:
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name)
        self._bias(Shape(rows), name)
        return Shape(rows)

    def _shard(self, name: str) -> Shard | None:
        self._weight(f"{name}.weight")
        return self._declared[f"{name}.weight"].parts[0].shard

    def _check_cut(self, name: str, axis: int | None, operation: str) -> None:
        shard = self._shard(name)
        declared = None if shard is None else shard.axis
        if declared != axis:
            cuts = {None: "whole on every rank", 0: "split by outputs", 1: "split by inputs"}
            raise ConfigError(
                f"{operation} needs a weight that is {cuts[axis]}, but {name}.weight is declared {cuts[declared]}"
            )

    def _check_vocabulary(self, name: str) -> None:
        shard = self._shard(name)
        if shard is None or shard.axis != 0 or not shard.pad_to:
            raise ConfigError(f"{name}.weight is not split by vocabulary rows; declare it with vocabulary_shard")

    def _take(self, x: Shape, width: int, name: str, kinds: tuple[Kind, ...] = ("whole",)) -> None:
        if x.kind not in kinds:
            wanted = " or ".join(_WORDS[kind] for kind in kinds)
            way = "; call all_reduce (or row_linear)" if x.kind == "partial" else ""
            raise ConfigError(f"{name} takes a tensor that is {wanted}, but this one is {_WORDS[x.kind]}{way}")
        if x.width != width:
            raise ConfigError(f"{name} takes {width} columns, but the tensor has {x.width}")


_COMPLETE: tuple[Kind, ...] = ("whole", "split")
_WORDS: Mapping[Kind, str] = {
    "whole": "whole on every rank",
    "split": "split over ranks",
    "partial": "still to be summed over ranks",
}


def use_of(model: Model, config: ModelConfig) -> ModelUse:
    """What all passes of a model use, over all layers.

    Raises:
        ConfigError: see `ShapeOps`, with the function that is wrong; or a function does not return what it should, a weight
            is not used, a layer's attention is not the one that its family declares.
    """
    ops = ShapeOps(_declarations(model, config))
    for each in model.passes.values():
        _run(ops, model, each, config)
    if (unused := ops.unused) is not None:
        raise ConfigError(f"{model.architecture}: {unused} is declared but not used")
    return ops.use


def _declarations(model: Model, config: ModelConfig) -> dict[str, WeightSpec]:
    declared: dict[str, WeightSpec] = {}
    with _naming(f"{model.architecture}, declaring weights"):
        for spec in model.weights(config):
            if spec.name in declared:
                raise ConfigError(f"{spec.name} is declared twice")
            declared[spec.name] = spec
    return declared


def _run(ops: ShapeOps, model: Model, each: Pass[Any], config: ModelConfig) -> None:
    """One pass, function by function."""
    with _naming(f"{model.architecture}, embed"):
        x = _complete(each.embed(ops, config), "embed")
    residual: Shape | None = None
    for layer in each.layers(config):
        with _naming(f"{model.architecture}, block of layer {layer}"):
            ops.layer, specs = layer, each.specs(config, layer)
            x, residual = _outputs(each.block(ops, config, layer, x, residual))
            for name, spec in ops.use.attention.items():
                if spec not in specs and name not in ops.attended:
                    raise ConfigError(f"{name} is {spec}, which the family does not declare for this layer")
            ops.attended |= ops.use.attention.keys()
    with _naming(f"{model.architecture}, head"):
        result = each.head(ops, config, x, residual)
        if each.output == "logits" and not (isinstance(result, Shape) and result.kind == "split"):
            raise ConfigError(f"the head returns {result}, not what logits returns")


def _outputs(result: Any) -> tuple[Shape, Shape | None]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConfigError(f"a block returns (x, residual), but this is {result}")
    x, residual = result
    return _complete(x, "x"), None if residual is None else _complete(residual, "residual")


def _complete(x: Any, name: str) -> Shape:
    if not isinstance(x, Shape):
        raise ConfigError(f"{name} is {x!r}, not a tensor")
    if x.kind != "whole":
        raise ConfigError(f"{name} is returned {_WORDS[x.kind]}; it must be whole on every rank")
    return x


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say in which function a mistake is, and take whatever a function raises for one."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


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
