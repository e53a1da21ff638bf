# SPDX-License-Identifier: Apache-2.0
"""Whether declarations of weights are possible, before anything runs on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard

__all__ = ["check_declaration", "check_sources", "listed"]


def check_declaration(spec: Any) -> None:
    """Check one weight: its name, its parts and their axes.

    Raises:
        ConfigError: naming the weight and what is wrong.
    """
    if not isinstance(spec, WeightSpec):
        raise ConfigError(f"{spec!r} is not a WeightSpec")
    if not spec.owner:
        raise ConfigError(f"{spec.name!r} says not what it is; add .weight or .bias to the name")
    if not isinstance(spec.parts, tuple) or not spec.parts or not all(isinstance(part, Part) for part in spec.parts):
        raise ConfigError(f"the parts of {spec.name} are {spec.parts!r}; give a tuple of at least one Part")
    for part in spec.parts:
        _check_part(spec.name, part)
        if part.shard is not None and not 0 <= part.shard.axis < len(part.shape):
            raise ConfigError(
                f"{spec.name} is split along axis {part.shard.axis}, which {part.source} of shape {part.shape} lacks"
            )
        if part.shard is not None and _has_rest(part.shard, part.shape[part.shard.axis]):
            raise ConfigError(
                f"{part.source} of shape {part.shape} in {spec.name} is no multiple of the unit {part.shard.unit} ({part.shard.what}) "
                f"along axis {part.shard.axis}"
            )
        if part.shape[1:] != spec.parts[0].shape[1:]:
            raise ConfigError(
                f"{spec.name} is made of parts of shapes {spec.parts[0].shape} and {part.shape}; they may differ in their rows only"
            )


def listed(specs: Any, function: str) -> list[WeightSpec]:
    """Return what a function of declarations returned, if that is a list.

    Raises:
        ConfigError: it is something else, perhaps one that can be read once only.
    """
    if not isinstance(specs, list):
        raise ConfigError(f"{function} returns {type(specs).__name__}, not a list of WeightSpec")
    return specs


def _has_rest(shard: Shard, extent: int) -> bool:
    return extent % shard.unit != 0 and not (shard.pad_to or shard.has_short_last)


def _check_part(name: str, part: Part) -> None:
    if not all(isinstance(source, str) and source for source in part.names) or isinstance(part.aliases, str):
        raise ConfigError(
            f"a part of {name} has source={part.source!r} and aliases={part.aliases!r}; give a text and a tuple of texts"
        )
    if not part.shape or not all(isinstance(extent, int) and extent > 0 for extent in part.shape):
        raise ConfigError(f"{part.source} in {name} has shape={part.shape!r}; give whole numbers above 0")


def check_sources(specs: Iterable[WeightSpec]) -> None:
    """Check that parts of one source tensor lie within its rows, and together take all of them.

    Raises:
        ConfigError: naming the source and the rows.
    """
    parts = [part for spec in specs for part in spec.parts]
    sliced = {part.source for part in parts if part.source_rows or part.first_row}
    ranges: dict[str, set[tuple[int, int]]] = {}
    extents: dict[str, int] = {}
    for part in (part for part in parts if part.source in sliced):
        rows, stop = part.source_extents[0], part.first_row + part.shape[0]
        if not 0 <= part.first_row < stop <= rows or extents.setdefault(part.source, rows) != rows:
            raise ConfigError(
                f"rows {part.first_row} to {stop} of {part.source} are declared, which has {extents.get(part.source, rows)} rows; "
                "correct first_row, shape or source_rows"
            )
        ranges.setdefault(part.source, set()).add((part.first_row, stop))
    for source, rows in extents.items():
        end = 0
        for start, stop in sorted(ranges[source]):
            if start > end:
                break
            end = max(end, stop)
        if end < rows:
            raise ConfigError(
                f"no weight takes the rows from {end} on of {source}, which has {rows}; declare a part for them"
            )
