# SPDX-License-Identifier: Apache-2.0
"""Operations on shapes alone: they record what a model uses and refuse what cannot be right."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import Activation
from phalanx.runtime.models import columns as columns_of
from phalanx.runtime.models.columns import Run, difference, runs_of
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec, Ops

__all__ = ["WORDS", "Feature", "ModelUse", "Shape", "ShapeOps", "state_of"]

_ONLY_READ = ("rms_norm", "layer_norm", "column_linear", "row_linear_partial", "experts", "logits")
"""Operations that leave their tensors as they are; see `phalanx.runtime.ops`, *Ownership*."""


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
        gates: names of matrices of `Ops.sigmoid_gate`.
        calls: every operation with its arguments other than tensors.
    """

    features: dict[Feature, None] = field(default_factory=dict)
    weights: dict[str, None] = field(default_factory=dict)
    attention: dict[str, AttentionSpec] = field(default_factory=dict)
    experts: dict[str, ExpertsSpec] = field(default_factory=dict)
    gates: dict[str, None] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


Kind = Literal["whole", "split", "partial"]
"""What a rank holds of a tensor: all of it, a share of its columns, or a product that is still to be summed over ranks."""


@dataclass(slots=True)
class Shape:
    """A tensor ``[T, width]`` over all ranks.

    Attributes:
        runs: how the columns of a split one are divided.
        owner: the operation that it was given to for good.
        is_read: whether an operation took it since a function returned it.
        is_gone: whether the function that made it ended without returning it.
    """

    width: int
    kind: Kind = "whole"
    runs: tuple[Run, ...] = field(default=(), compare=False, repr=False)
    owner: str = field(default="", compare=False)
    is_read: bool = field(default=False, compare=False, repr=False)
    is_gone: bool = field(default=False, compare=False, repr=False)

    def __bool__(self) -> bool:
        raise ConfigError("a condition depends on a tensor, whose values no function sees; decide by the configuration")


class ShapeOps(Ops[Shape]):
    """Operations on shapes; records into ``use``.

    Args:
        declared: the weights that the model declares, by name.

    Raises:
        ConfigError: a weight is not declared, is not split as the operation needs it, or does not fit; or a sum over ranks
            is missing or done twice; or an argument is no tensor, no number, or was given away before.
    """

    def __init__(self, declared: Mapping[str, WeightSpec]) -> None:
        self._declared = declared
        self.use = ModelUse()
        self.layer: int | None = None  # the one whose block runs; None = not known
        self.own: frozenset[str] | None = None  # what the declarations of the running function name; None = not known
        self.tables: dict[str, int] = {}  # rows of each table of the vocabulary
        self.num_positions: float = math.inf  # rows of the smallest table of positions
        self._living: list[Shape] = []  # what the running function made, and was given
        self._caches: set[tuple[int, str]] = set()
        self.attended: set[str] = set()  # names of attentions of earlier layers
        self.last_logits: Shape | None = None

    def end_function(self, *returned: Shape | None) -> None:
        """The running function ends: nothing but what it returned goes on."""
        for tensor in self._living:
            tensor.is_gone = not any(tensor is kept for kept in returned)
        self._living = [tensor for tensor in returned if tensor is not None]

    def alone(self) -> ShapeOps:
        """Operations for the function that runs now, which have recorded nothing."""
        ops = ShapeOps(self._declared)
        ops.layer, ops.own = self.layer, self.own
        return ops

    @property
    def unused(self) -> str | None:
        """The first declared weight that no function has used; None if there is none."""
        return next((name for name in self._declared if name not in self.use.weights), None)

    def embedding(self, name: str, scale: float = 1.0) -> Shape:
        self._record("embedding", scale=scale)
        self._check_vocabulary(name)
        return self._made(self._weight(f"{name}.weight")[1])

    def position_embedding(self, x: Shape, name: str) -> Shape:
        self._record("position_embedding", x)
        self._check_whole(name)
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name)
        self.num_positions = min(rows, self.num_positions)
        return self._made(x.width)

    def rms_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        self._record("rms_norm", x, values={"eps": eps}, weight_offset=weight_offset)
        self._check_whole(name)
        self._take(x, self._weight(f"{name}.weight")[0], name)
        return self._made(x.width)

    def layer_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        self._record("layer_norm", x, values={"eps": eps}, weight_offset=weight_offset)
        has_weight = f"{name}.weight" in self._declared
        if has_weight:
            self._check_whole(name)
        self._take(x, self._weight(f"{name}.weight")[0] if has_weight else x.width, name)
        self._bias(x, name)
        return self._made(x.width)

    def linear(self, x: Shape, name: str) -> Shape:
        self._record("column_linear", x)
        self._check_cut(name, None, "linear")
        return self._product(x, name)

    def column_linear(self, x: Shape, name: str) -> Shape:
        self._record("column_linear", x)
        self._check_cut(name, 0, "column_linear")
        return self._product(x, name, "split")

    def row_linear_partial(self, x: Shape, name: str) -> Shape:
        self._record("row_linear_partial", x)
        self._check_cut(name, 1, "row_linear")
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name, ("split",))
        columns_of.check_inputs(name, self._declared[f"{name}.weight"].parts, x.runs)
        return self._made(rows, "partial")

    def add_bias(self, x: Shape, name: str) -> Shape:
        self._record("add_bias", x)
        if x.kind == "partial":
            raise ConfigError(
                f"the bias of {name} is added to a partial product, once on each rank; call all_reduce first"
            )
        self._bias(x, name)
        return self._made(x.width, x.kind, x.runs)

    def all_reduce(self, x: Shape) -> Shape:
        self._record("all_reduce", x)
        if x.kind != "partial":
            raise ConfigError(f"all_reduce sums a tensor that is {WORDS[x.kind]}, no partial product; leave it out")
        return self._made(x.width)

    def add(self, x: Shape, y: Shape) -> Shape:
        self._record("add", x, y)
        if x.kind != y.kind:
            raise ConfigError(
                f"add takes a tensor that is {WORDS[x.kind]} and one that is {WORDS[y.kind]}; sum over ranks first"
            )
        if x.width != y.width:
            raise ConfigError(f"add takes tensors of {x.width} and {y.width} columns; they must be equal")
        if where := difference(x.runs, y.runs):
            raise ConfigError(f"add takes tensors whose columns are divided differently over ranks, {where}")
        return self._made(x.width, x.kind, x.runs)

    def scale(self, x: Shape, factor: float) -> Shape:
        self._record("scale", x, values={"factor": factor})
        return self._made(x.width, x.kind, x.runs)

    def clip(self, x: Shape, limit: float) -> Shape:
        self._record("clip", x, values={"limit": limit})
        if limit <= 0:
            raise ConfigError(f"clip has limit={limit}; it must be above 0")
        self._take(x, x.width, "clip", _COMPLETE)
        return self._made(x.width, x.kind, x.runs)

    def activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("activation", x, kind=kind)
        self._take(x, x.width, "an activation", _COMPLETE)
        return self._made(x.width, x.kind, x.runs)

    def gated_activation(self, x: Shape, kind: Activation) -> Shape:
        self._record("gated_activation", x, kind=kind)
        self._take(x, x.width, "an activation", _COMPLETE)
        if x.width % 2:
            raise ConfigError(f"gated_activation takes gate and up side by side, but the tensor has {x.width} columns")
        half = columns_of.half(x.width, x.runs)
        return self._made(x.width // 2, x.kind, half)

    def attention(self, qkv: Shape, name: str, layer: int, spec: AttentionSpec) -> Shape:
        self._record("attention", qkv, spec=spec)
        if self.layer not in (None, layer):
            raise ConfigError(f"{name} uses the cache of layer {layer}; pass the layer that the block is called for")
        if (layer, spec.keys) in self._caches:
            raise ConfigError(f"{name} uses the cache of layer {layer} a second time; a layer has one attention")
        self._caches.add((layer, spec.keys))
        heads = spec.num_heads + 2 * spec.num_kv_heads if spec.keys == "own" else spec.num_heads
        self._take(qkv, heads * spec.head_dim, name, ("split",))
        columns_of.check_heads(name, qkv.runs, spec)
        if spec.head_norm is not None:
            self._check_head_norms(spec, spec.head_norm, name)
        self.use.attention[name] = spec
        return self._made(spec.num_heads * spec.head_dim, "split", qkv.runs[:1])

    def logits(self, x: Shape, name: str, soft_cap: float = 0.0) -> Shape:
        self._record("logits", x, soft_cap=soft_cap)
        self._check_vocabulary(name)
        self.last_logits = self._product(x, name, "split")
        return self.last_logits

    def experts(self, x: Shape, name: str, spec: ExpertsSpec) -> Shape:
        self._record("experts", x, spec=spec)
        self.use.experts[name] = spec
        self._check_cut(f"{name}.router", None, "experts")
        self._product(x, f"{name}.router")
        gate_up, down = (self._weight(f"{name}.{kind}.weight") for kind in ("gate_up", "down"))
        self._take(x, gate_up[1], name)
        self._take(Shape(gate_up[0] // (2 * spec.num_experts)), down[1], name)
        matrices = [self._declared[f"{name}.{kind}.weight"].parts for kind in ("gate_up", "down")]
        columns_of.check_experts(name, matrices[0], matrices[1], spec.num_experts)
        return self._made(down[0] // spec.num_experts, "partial")

    def sigmoid_gate(self, x: Shape, y: Shape, name: str) -> Shape:
        self._record("sigmoid_gate", x)
        self.use.gates[name] = None
        self._check_cut(name, None, "sigmoid_gate")
        _, columns = self._weight(f"{name}.weight")
        self._take(y, columns, name)
        return self._made(x.width, x.kind, x.runs)

    def _made(self, width: int, kind: Kind = "whole", runs: tuple[Run, ...] = ()) -> Shape:
        """A result of the running function."""
        self._living.append(tensor := Shape(width, kind, runs))
        return tensor

    def _record(
        self, operation: str, *tensors: Shape, values: Mapping[str, float] = MappingProxyType({}), **options: Any
    ) -> None:
        """An operation with its tensors, and its options, of which ``values`` concern no executor."""
        for tensor in tensors:
            self._pass(tensor, operation)
        _check_options(operation, {**values, **options})
        self.use.calls.append((operation, {**values, **options}))
        self.use.features[Feature(operation)] = None
        defaults = _defaults(operation)
        for option, value in options.items():
            if value == defaults[option]:
                continue
            # The one dataclass argument of an operation goes without its name: attention.window, not attention.spec.window.
            name = operation if dataclasses.is_dataclass(value) else f"{operation}.{option}"
            for feature in _features(name, value):
                self.use.features[feature] = None

    def _pass(self, tensor: Shape, operation: str) -> None:
        """A tensor as an argument: the operation may overwrite it unless it only reads."""
        state_of(tensor, f"an argument of {operation}").is_read = True
        if operation not in _ONLY_READ:
            tensor.owner = operation

    def _weight(self, name: str) -> tuple[int, ...]:
        if name not in self._declared:
            raise ConfigError(f"uses weight {name!r}, which is not declared")
        if self.own is not None and name not in self.own:
            raise ConfigError(
                f"uses weight {name!r}, which is declared elsewhere only, so that another pipeline stage may hold it; declare it for "
                "this function, too"
            )
        self.use.weights[name] = None
        return self._declared[name].whole_shape

    def _bias(self, x: Shape, name: str) -> None:
        """A bias, if there is one: of ``x``'s width, and cut as ``x`` is."""
        if f"{name}.bias" not in self._declared:
            return
        self._take(x, self._weight(f"{name}.bias")[0], f"the bias of {name}", _COMPLETE)
        is_cut = any(part.shard is not None for part in self._declared[f"{name}.bias"].parts)
        if is_cut != (x.kind == "split"):
            cuts = {True: "split over ranks", False: "whole on every rank"}
            raise ConfigError(f"{name}.bias is declared {cuts[is_cut]}, but what it is added to is {WORDS[x.kind]}")
        if where := difference(runs_of(self._declared[f"{name}.bias"].parts, 0), x.runs):
            raise ConfigError(f"{name}.bias is divided otherwise than what it is added to, {where}; declare both alike")

    def _check_whole(self, name: str) -> None:
        self._weight(f"{name}.weight")
        if any(part.shard is not None for part in self._declared[f"{name}.weight"].parts):
            raise ConfigError(
                f"{name}.weight is declared split over ranks, but every rank needs all of it; leave the shard out"
            )

    def _check_head_norms(self, spec: AttentionSpec, norm: HeadNorm, name: str) -> None:
        for side, heads in (("query_norm", spec.num_heads), ("key_norm", spec.num_kv_heads)):
            for kind in ("weight", "bias") if norm.has_bias else ("weight",):
                size = math.prod(self._weight(f"{name}.{side}.{kind}"))
                self._take(Shape(spec.head_dim * (heads if norm.own_weights else 1)), size, f"{name}.{side}")
                full = f"{name}.{side}.{kind}"
                columns_of.check_head_norm(
                    full, self._declared[full].parts, spec, norm, of_queries=side == "query_norm"
                )

    def _product(self, x: Shape, name: str, kind: Kind = "whole") -> Shape:
        rows, columns = self._weight(f"{name}.weight")
        self._take(x, columns, name)
        runs = runs_of(self._declared[f"{name}.weight"].parts, 0) if kind == "split" else ()
        result = self._made(rows, kind, runs)
        self._bias(result, name)
        return result

    def _shard(self, name: str) -> Shard | None:
        self._weight(f"{name}.weight")
        first, *others = (part.shard for part in self._declared[f"{name}.weight"].parts)
        axis = None if first is None else first.axis
        if any(axis != (None if shard is None else shard.axis) for shard in others):
            raise ConfigError(f"the parts of {name}.weight are split along different axes; split all of them alike")
        return first

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
        self.tables[name] = sum(part.shape[0] for part in self._declared[f"{name}.weight"].parts)

    def _take(self, x: Shape, width: int, name: str, kinds: tuple[Kind, ...] = ("whole",)) -> None:
        if x.kind not in kinds:
            wanted = " or ".join(WORDS[kind] for kind in kinds)
            way = "; call all_reduce (or row_linear)" if x.kind == "partial" else ""
            raise ConfigError(f"{name} takes a tensor that is {wanted}, but this one is {WORDS[x.kind]}{way}")
        if x.width != width:
            raise ConfigError(f"{name} takes {width} columns, but the tensor has {x.width}")


_COMPLETE: tuple[Kind, ...] = ("whole", "split")
WORDS: Mapping[Kind, str] = {
    "whole": "whole on every rank",
    "split": "split over ranks",
    "partial": "still to be summed over ranks",
}
"""What a tensor of each kind is, in messages."""


def state_of(x: Any, what: str) -> Shape:
    """``x`` if it is a tensor that no operation has taken.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(x, Shape):
        raise ConfigError(f"{what} is {x!r}, not a tensor")
    if x.is_gone:
        raise ConfigError(
            f"{what} is a tensor that another function made and did not return; the next function may run on another pipeline stage, which "
            "is handed x and residual alone"
        )
    if x.owner:
        raise ConfigError(f"{what} is a tensor that {x.owner} may have overwritten; go on with what {x.owner} returned")
    return x


def _check_options(operation: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name == "kind":
            if value not in get_args(Activation):
                raise ConfigError(f"{operation} knows no {value!r}; it knows {', '.join(get_args(Activation))}")
        elif name != "spec" and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise ConfigError(f"{operation} has {name}={value!r}, which is not a finite number")


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
