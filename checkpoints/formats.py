# SPDX-License-Identifier: Apache-2.0
"""Weight formats: which stored tensors a weight is read from, which tensors it becomes in memory, where it may be cut.

Everything that handles weights (loader, splitter, coverage proof, memory planner, dummy weights, engine builders) works on
component declarations and knows no format. Nothing here needs NumPy: plans are made from ``config.json`` alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from phalanx.checkpoints.quantized import describe_quantization, quantization_method
from phalanx.checkpoints.spec import Part, WeightSpec, find_stored
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = [
    "ALL_DENSE",
    "DENSE",
    "FORMAT_READERS",
    "Format",
    "FormatPlan",
    "FormattedWeight",
    "Multiply",
    "Unread",
    "components_of",
    "format_weights",
    "read_formats",
]


Multiply = Callable[["Array", "Array"], "Array"]
"""``x [T, in], weight [out, in] -> x @ weight.T``, all float32."""


class Format(Protocol):
    """How a matrix is stored, held and cut. Comparable by value; two weights with equal formats are computed alike."""

    @property
    def name(self) -> str:
        """What refusals, reports and `Capabilities.formats` call it: ``int8 with a scale per row``."""
        ...

    @property
    def scheme(self) -> str:
        """How weights and activations are quantised, for people: ``fp8 by row, activations by token``; "" = not at all."""
        ...

    def units(self, part: Part) -> tuple[int, ...]:
        """For each axis of ``part`` how many consecutive values must stay on one rank (a quantisation group); 1 = any."""
        ...

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """What the weight ``spec`` consists of in memory, named ``<spec.owner>.<component>``.

        Parts of a merged weight (q, k and v) become parts of each component, so that each keeps its own scales. Shards in
        ``spec`` already respect `units`.
        """
        ...

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """The values that the components of one rank stand for, float32 in the shape of the weight."""
        ...

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        """What `product` takes for the components; made once, of float32, which a processor multiplies fastest.

        All arrays but ``input_scale`` have an entry for each output along axis 0, so outputs can be computed apart.
        """
        ...

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        """Outputs ``[T, out]`` for inputs ``[T, in]``, float32, without a bias: the definition that all engines follow.

        ``multiply`` is how the caller multiplies float32 matrices.
        """
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """Plain values, stored in any float format and held in the compute type."""

    name: str = "dense"
    scheme: str = ""

    def units(self, part: Part) -> tuple[int, ...]:
        """Any cut."""
        return (1,) * len(part.shape)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """The weight itself."""
        return (spec,)

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """The weight itself."""
        return components["weight"]

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        return components

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        return multiply(x, operand["weight"])


DENSE = Dense()


@dataclass(frozen=True, slots=True)
class Unread:
    """Tensors that quantisers write though they say nothing new.

    Attributes:
        pattern: regular expression (full match) of their names.
        holds: what they must hold, for messages: ``zeros``.
        is_so: whether a tensor does, of a module whose whole matrix has the extents ``(out, in)``; () = it has no codes.
    """

    pattern: str
    holds: str
    is_so: Callable[[Array, tuple[int, ...]], bool]


@dataclass(frozen=True, slots=True)
class FormatPlan:
    """Which weight of a checkpoint has which format.

    Attributes:
        choose: format of a matrix, by the names that the modules of its parts may have. Biases and norms are always dense.
        ignored_tensors: regular expressions (full match) of tensors that the formats store but do not need.
        unread: tensors that are stored, too, and hold nothing that the formats do not say: they are looked at, not used.
        has_kv_scales: the checkpoint promises scales of an fp8 key/value cache (`phalanx.checkpoints.quantization.kv_scales`).
        choose_by_names: where ``config.json`` leaves open which tensors a module has: `choose` for the names of all that are stored.
            Without them `choose` takes what quantisers usually write.
    """

    choose: Callable[[WeightSpec], Format]
    ignored_tensors: tuple[str, ...] = ()
    has_kv_scales: bool = False
    unread: tuple[Unread, ...] = ()
    choose_by_names: Callable[[Collection[str]], Callable[[WeightSpec], Format]] | None = None

    def for_stored(self, names: Collection[str]) -> FormatPlan:
        """The plan of a checkpoint that holds tensors of these names: each part goes by the name under which it is there.

        Where rules match only another of its names, what is stored decides whether they are meant. Routers that are stored as plain
        values are plain: GPTQ lists nothing that stays as it is, and where a quantiser saw a router as a parameter, not as a linear
        module, its rules do not name it.
        """
        present = frozenset(names)
        choose = self.choose if self.choose_by_names is None else self.choose_by_names(present)
        modules = {name.rpartition(".")[0] for name in present}

        def chosen(spec: WeightSpec) -> Format:
            found = choose(_as_stored(spec, modules))
            return DENSE if _is_plain_router(spec, found, present) else found

        return replace(self, choose=chosen)

    @property
    def not_used(self) -> tuple[str, ...]:
        """Regular expressions (full match) of all tensors that may be there and are not used."""
        return (*self.ignored_tensors, *(each.pattern for each in self.unread))


ALL_DENSE = FormatPlan(lambda spec: DENSE)


@dataclass(frozen=True, slots=True)
class FormattedWeight:
    """A weight with its format.

    Attributes:
        spec: as the model declares it, with shards that cut between the format's units.
        components: what is loaded and held.
    """

    spec: WeightSpec
    format: Format
    components: tuple[WeightSpec, ...]


def format_weights(specs: Sequence[WeightSpec], plan: FormatPlan) -> list[FormattedWeight]:
    """Weights of whole layers with their formats.

    Within a layer, parts that are split alike (gate and up by rows, down by columns) get the same cuts, which respect the units
    of all of them.

    Raises:
        ConfigError: a group of values would have to be cut.
    """
    formats = [plan.choose(spec) if len(spec.parts[0].shape) > 1 else DENSE for spec in specs]
    units: dict[_Cut, int] = {}
    for spec, chosen in zip(specs, formats, strict=True):
        layer = spec.owner.rpartition(".")[0]
        for part in spec.parts:
            if part.shard is not None:
                cut = _cut(layer, part, part.shard)
                units[cut] = math.lcm(units.get(cut, 1), chosen.units(part)[part.shard.axis])
    aligned = [_aligned(spec, units) for spec in specs]
    return [
        FormattedWeight(spec, chosen, chosen.components(spec)) for spec, chosen in zip(aligned, formats, strict=True)
    ]


def components_of(weights: Iterable[FormattedWeight]) -> list[WeightSpec]:
    """All components, in order."""
    return [component for weight in weights for component in weight.components]


def _as_stored(spec: WeightSpec, modules: Collection[str]) -> WeightSpec:
    """``spec`` with those names of each part first under which there is a module, if any is."""
    if not any(part.aliases for part in spec.parts):
        return spec
    parts = []
    for part in spec.parts:
        source, *aliases = sorted(part.names, key=lambda name: find_stored([name.rpartition(".")[0]], modules) is None)
        parts.append(replace(part, source=source, aliases=tuple(aliases)))
    return replace(spec, parts=tuple(parts))


def _is_plain_router(spec: WeightSpec, chosen: Format, present: frozenset[str]) -> bool:
    """Whether ``spec``, a matrix that every rank holds whole, is there, but not all that the format ``chosen`` needs of it."""
    if len(spec.parts[0].shape) != 2 or any(part.shard for part in spec.parts):
        return False
    needed = (part for component in chosen.components(spec) for part in component.parts)
    is_there, is_quantised = (all(find_stored(part.names, present) for part in parts) for parts in (spec.parts, needed))
    return is_there and not is_quantised


_Cut = tuple[str, Shard, int]
"""Parts with equal cuts share the ranges of ranks: same layer, same shard on whatever axis, same extent."""


def _cut(layer: str, part: Part, shard: Shard) -> _Cut:
    return layer, _on_any_axis(shard), part.shape[shard.axis]


@lru_cache(maxsize=1024)
def _on_any_axis(shard: Shard) -> Shard:
    return replace(shard, axis=0)


def _aligned(spec: WeightSpec, units: Mapping[_Cut, int]) -> WeightSpec:
    """With shards that cut between units. Layers of many experts have hundreds of parts: what stays as it is is not copied."""
    layer = spec.owner.rpartition(".")[0]
    parts = []
    for part in spec.parts:
        needed = 1 if part.shard is None else units[_cut(layer, part, part.shard)]
        parts.append(part if part.shard is None or needed == 1 else _aligned_part(spec, part, part.shard, needed))
    return spec if all(map(is_, parts, spec.parts)) else replace(spec, parts=tuple(parts))


def _aligned_part(spec: WeightSpec, part: Part, shard: Shard, needed: int) -> Part:
    extent = part.shape[shard.axis]
    unit = math.lcm(shard.unit, needed)
    pieces = shard.groups or shard.whole
    each = (shard.whole * shard.unit or extent) // pieces if pieces else unit
    if each % unit or (shard.whole and unit != shard.unit):
        raise ConfigError(
            f"{spec.name}: groups of {needed} values do not divide the {each} of each of "
            f"{pieces} {shard.what}; use a checkpoint with smaller quantisation groups"
        )
    pad_to = math.lcm(shard.pad_to, needed) if shard.pad_to else 0
    whole = "; --expert-parallel cuts no expert" if ".experts." in spec.owner else ""
    what = shard.what
    if not pieces and unit != shard.unit:
        source = re.sub(r"\.\d+(?=\.)", ".*", part.source)  # one shard for all layers: what is computed from it is kept
        what = f"pieces of {unit} of {source} (quantisation groups of {needed}{whole})"
    return replace(part, shard=replace(shard, unit=unit, pad_to=pad_to, has_short_last=bool(extent % unit), what=what))


FORMAT_READERS: Mapping[str, Callable[[Mapping[str, Any]], FormatPlan]] = MappingProxyType({})
"""``quant_method`` of ``config.json`` -> what reads its ``quantization_config``, besides the readers of this package."""


def read_formats(config: Mapping[str, Any]) -> FormatPlan:
    """Formats of a checkpoint's weights, from its ``config.json``.

    Raises:
        ConfigError: the checkpoint is quantised in a way that cannot be read.
    """
    description = describe_quantization(config)
    if description is None:
        return ALL_DENSE
    section = config.get("quantization_config") or config.get("compression_config")
    fields: dict[str, Any] = section if isinstance(section, dict) else {}
    if isinstance(nested := fields.get("quantization_config"), dict):  # early releases of compressed-tensors
        fields = {**fields, **nested}
    from phalanx.checkpoints.quantization.choosing import WAY_OUT
    from phalanx.checkpoints.quantization.readers import READERS

    method = quantization_method(fields)
    if fields and not method:
        raise ConfigError(
            f"{description}, but not by which quant_method; restore it from where the checkpoint comes from"
        )
    reader = {**READERS, **FORMAT_READERS}.get(method) or READERS.get(method.lower())
    if reader is None:
        raise ConfigError(f"{description}; it cannot be loaded: {WAY_OUT}")
    return reader(fields)
