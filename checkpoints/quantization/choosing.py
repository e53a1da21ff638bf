# SPDX-License-Identifier: Apache-2.0
"""What readers of ``quantization_config`` share: from rules about modules to formats of weights, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Unread
from phalanx.checkpoints.quantization.fields import Section, integer, names
from phalanx.checkpoints.quantization.group_codes import GroupCodes, InputScales, Stored
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.resolve import first_few
from phalanx.checkpoints.spec import WeightSpec, find_stored
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = [
    "HEAD",
    "KV_SCALES",
    "WAY_OUT",
    "Chooser",
    "Section",
    "block_sizes",
    "compiled",
    "excluding",
    "fp8_blocks",
    "groups_in_order",
    "of_parts",
    "refused",
]

Chooser = Callable[[Sequence[str]], Format]
"""Format of a module, by every name that it may have, and for the model's head by `HEAD`, too. Rules are about the classes of the
program that quantised it, whose names for a module need not be those in the file: transformers renames some as it saves."""
HEAD = "lm_head"
"""What quantisers' rules call the head."""

KV_SCALES = (r".*\.(k_scale|v_scale|kv_scale)", r".*\.[kv]_proj\.output_scale")
WAY_OUT = "use the unquantised checkpoint, or one in compressed-tensors fp8, int8, w8a16 or w4a16"


def fp8_blocks(scale: str, rows: int, columns: int, inputs: InputScales = "fp8 groups") -> GroupCodes:
    """Codes with a scale for each block, named ``scale``; inputs with one for each group of as many columns, unless they are plain."""
    stored = Stored("weight", scale, dtype="F8_E4M3", block_rows=rows)
    return GroupCodes("fp8 blocks", stored, columns, input=inputs)


def excluding(chosen: GroupCodes | RowCodes, section: Section, always: tuple[str, ...] = ()) -> FormatPlan:
    """``chosen`` for every module whose path contains none of the excluded names, nor of ``always``; the head if none are given.

    A name ends where a component of the path does: ``mlp.gate`` says nothing of ``mlp.gate_proj``. Other programs end it anywhere:
    AutoAWQ, which looks for it in the whole path, and transformers (``quantizers_utils.should_convert_module``), which takes it as an
    expression for the beginning of the path, or as the path's end. So for a name that ends within a component, what is stored decides.
    """
    keys = ("modules_to_not_convert", "ignored_layers", "ignore")
    excluded = (*(name for key in keys for name in names(section, key)), *always) or (HEAD,)
    exclusions, scales = [_Exclusion.of(name) for name in excluded], chosen.scale_names

    def chooser(stored: Collection[str]) -> Chooser:
        def choose(modules: Sequence[str]) -> Format:
            found = [one for one in exclusions if any(map(one.is_in, modules))]
            if any(one.ends_a_component(module) for one in found for module in modules):
                return DENSE
            may_be_plain = bool(stored and found)
            if may_be_plain and find_stored([f"{one}.{scale}" for one in modules for scale in scales], stored) is None:
                return DENSE
            return chosen

        return choose

    return FormatPlan(of_parts(chooser(())), choose_by_names=lambda stored: of_parts(chooser(stored), stored))


@dataclass(frozen=True, slots=True)
class _Exclusion:
    """A name that paths contain, or an expression for their beginnings; compiled alone, as flags and groups count in all of it."""

    name: str
    start: re.Pattern[str]
    whole_name: re.Pattern[str]
    whole_start: re.Pattern[str]

    @classmethod
    def of(cls, name: str) -> _Exclusion:
        """Raises `ConfigError` for what is no expression."""
        end = r"(?:(?<=\.)|(?=\.|$))"
        flags = _FLAGS.match(name)
        first = flags.end() if flags else 0
        expressions = (name, rf"{re.escape(name)}{end}", rf"{name[:first]}(?:{name[first:]}){end}")
        return cls(name, *(compiled(expression, f"an exclusion {name!r}") for expression in expressions))

    def is_in(self, module: str) -> bool:
        """Whether it is in the path, wherever it ends."""
        return self.name in module or self.start.match(module) is not None

    def ends_a_component(self, module: str) -> bool:
        """Whether it is in the path and ends where a component does."""
        return self.whole_name.search(module) is not None or self.whole_start.match(module) is not None


_FLAGS = re.compile(r"\(\?[A-Za-z]+\)")
"""Flags for the whole of an expression, which must come first."""


def of_parts(choose: Chooser, stored: Collection[str] = ()) -> Callable[[WeightSpec], Format]:
    """A weight's format by the modules of its parts, which must agree. Tables of embeddings are dense.

    Args:
        stored: names of all tensors of the checkpoint, whose parts go by the names under which they are there; () = not known.
    """

    def of_weight(spec: WeightSpec) -> Format:
        if not (spec.owner.startswith("layers.") or spec.owner == "lm_head") or spec.owner.endswith("norm"):
            return DENSE
        if any("embed" in name or "wte" in name for part in spec.parts for name in part.names):
            return DENSE  # a head that is tied to the table
        modules: dict[Format, list[str]] = {}
        for part in spec.parts:
            chosen = _of_part(choose, replace(spec, parts=(part,)), stored)
            modules.setdefault(chosen, []).append(part.source.removesuffix(".weight"))
        if len(modules) > 1:
            given = sorted(f"{one.name} to {first_few(listed, 3)}" for one, listed in modules.items())
            raise ConfigError(
                f"quantization_config gives {' and '.join(given)}, which are computed as one product; use a checkpoint with one "
                "scheme for them"
            )
        (chosen,) = modules
        return chosen.for_weight(spec) if isinstance(chosen, GroupCodes) else chosen

    return of_weight


def _of_part(choose: Chooser, spec: WeightSpec, stored: Collection[str]) -> Format:
    """The format of ``spec``, which has one part, by those of its names that the rules mean.

    Where rules say different things of its names, what is stored decides: a rule that matches ``gate_proj`` says nothing of a file
    with ``w1`` unless the tensors are those of its format. Without a file, names that end like the usual one come first.
    """
    modules = [name.removesuffix(".weight") for name in spec.parts[0].names]
    head = (HEAD,) if spec.owner == HEAD else ()
    alike = [module for module in modules if module.rpartition(".")[2] == modules[0].rpartition(".")[2]]
    considered = (alike, modules[:1], modules) if stored else (alike, modules)
    formats = dict.fromkeys(choose(called) for called in dict.fromkeys((*called, *head) for called in considered))
    return max(formats, key=lambda one: _num_stored(one, spec, stored) if stored else one != DENSE)


def _num_stored(chosen: Format, spec: WeightSpec, stored: Collection[str]) -> int:
    """How many tensors ``chosen`` needs of ``spec``; 0 unless all are there."""
    parts = [part for component in chosen.components(spec) for part in component.parts]
    return len(parts) if all(find_stored(part.names, stored) for part in parts) else 0


def groups_in_order(suffix: str, formats: Iterable[Format], field: str, unset: int | None = None) -> tuple[Unread, ...]:
    """The rule for stored groups of columns that ``field`` says are in order: those of ``formats`` without an index, or all ``unset``."""
    chosen = (one for one in formats if isinstance(one, GroupCodes) and not one.stored.group_index)
    groups = sorted({one.group for one in chosen})

    def is_so(tensor: Array, extents: tuple[int, ...]) -> bool:
        import numpy as np

        if extents and tensor.shape != extents[1:]:
            return False
        columns = np.arange(len(tensor))
        plain = (columns // (group or max(len(tensor), 1)) for group in groups)
        return bool((tensor == unset).all()) or any(bool((tensor == one).all()) for one in plain)

    listed = " or ".join(map(str, groups))
    rule = Unread(rf".*\.{suffix}", f"groups of {listed} columns in order, as {field} says", is_so)
    return (rule,) if groups else ()


def block_sizes(sizes: Any, key: str, what: str) -> tuple[int, int]:
    """Return rows and columns of a block of weights with one scale; ``what`` begins the error.

    Raises:
        ConfigError: ``sizes`` are not two whole numbers.
    """
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise refused(f"{what} {key}={sizes!r}", "write the rows and columns of a block")
    rows, columns = (integer({key: size}, key, 0) for size in sizes)
    return rows, columns


def compiled(expression: str, what: str) -> re.Pattern[str]:
    """Raise ConfigError that names ``what`` for text that is no expression."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise refused(f"{what} ({error})", "correct the expression") from None


def refused(what: str, way_out: str) -> ConfigError:
    """The error that names what cannot be loaded, and what to do."""
    return ConfigError(f"quantization_config in config.json: {what} cannot be loaded; {way_out}")
