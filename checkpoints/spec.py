# SPDX-License-Identifier: Apache-2.0
"""Weight declarations: what a model needs, where it comes from, how it is split. Pure data.

The loader, the splitter, the memory planner and the TensorRT builder all read the same declaration, so a weight's
sharding is written down once, next to the model that uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from phalanx.checkpoints.encoding import Block, Encoding
from phalanx.parallel.sharding import Shard, Span

__all__ = ["DummyRange", "Part", "WeightSpec", "distinct", "find_stored"]


@dataclass(frozen=True, slots=True)
class Part:
    """One source tensor, or a range of its rows, in our ``[out, in]`` orientation.

    Attributes:
        source: tensor name in the checkpoint.
        shape: shape of the part in our orientation, before sharding: ``[out, in]`` or ``[out]``.
        shard: how it is split over tensor-parallel ranks; ``None`` = every rank holds all of it.
        aliases: other names that checkpoints in the wild use for the same tensor, tried in order.
        transposed: the source is stored ``[in, out]`` (GPT-2's Conv1D).
        first_row: where the part starts along axis 0 of the source in our orientation (fused q/k/v).
        source_rows: extent of axis 0 of the whole source in our orientation; 0 = the part is the whole source.
        encoding: how the source holds the values; None = one element for each value, in one of the float formats.
    """

    source: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    aliases: tuple[str, ...] = ()
    transposed: bool = False
    first_row: int = 0
    source_rows: int = 0
    encoding: Encoding | None = None

    @property
    def source_extents(self) -> tuple[int, ...]:
        """Extents of the whole source in values, in our orientation."""
        return (self.source_rows or self.shape[0], *self.shape[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the source tensor may have, most usual first."""
        return (self.source, *self.aliases)

    def siblings(self, *suffixes: str) -> tuple[str, ...]:
        """Names that a tensor of the same module may have: each of ``suffixes`` under each name of the module."""
        modules = [name.removesuffix(".weight") for name in self.names]
        return tuple(f"{module}.{suffix}" for module in modules for suffix in suffixes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape that the source tensor must have in the checkpoint."""
        whole = self.stored.source_extents
        return whole[::-1] if self.transposed else whole

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The smallest piece of the source that can be decoded, axis by axis in our orientation."""
        if self.encoding is None:
            return (Block(),) * len(self.shape)
        return self.encoding.blocks(self.source_extents)

    @property
    def stored(self) -> Part:
        """The same part counted in stored elements, as a plain part: what splits hold and what is proved about them.

        Where ranks' shares do not end between blocks, or the part shares a block with its neighbour in the source, every rank
        holds the part in full: such tensors (a scale for a whole matrix, a scale for 128 rows of heads of 64) are small.
        """
        if self.encoding is None:
            return self
        blocks = self.blocks
        rows, first = blocks[0], self.first_row // blocks[0].values
        stop = -(-(self.first_row + self.shape[0]) // rows.values)
        extents = tuple(
            -(-extent // block.values) * block.stored for extent, block in zip(self.shape, blocks, strict=True)
        )
        return replace(
            self,
            shape=((stop - first) * rows.stored, *extents[1:]),
            shard=None if self.shard is None else self._stored_shard(self.shard, blocks[self.shard.axis]),
            first_row=first * rows.stored,
            source_rows=-(-self.source_extents[0] // rows.values) * rows.stored,
            encoding=None,
        )

    def _stored_shard(self, shard: Shard, block: Block) -> Shard | None:
        if any(extent % block.values for extent in (shard.unit, shard.pad_to, *self._inner_edges(shard.axis))):
            return None
        unit, pad_to = (extent // block.values * block.stored for extent in (shard.unit, shard.pad_to))
        return replace(shard, unit=unit, pad_to=pad_to)

    def _inner_edges(self, axis: int) -> tuple[int, ...]:
        """Where along ``axis`` of the source the part begins, and where it ends unless the source does."""
        stop = self.first_row + self.shape[0]
        return () if axis else (self.first_row, *([stop] if stop < self.source_extents[0] else []))

    def span(self, axis: int, rank: int, size: int) -> Span:
        """What ``rank`` of ``size`` holds of ``axis``, relative to the part."""
        extent = self.shape[axis]
        if self.shard is None or self.shard.axis != axis:
            return Span(0, extent, extent)
        return self.shard.span(extent, rank, size)

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of this part on ``rank`` of ``size``, padding included."""
        return _local_shape(self.shape, self.shard, rank, size)


@lru_cache(maxsize=4096)
def _local_shape(shape: tuple[int, ...], shard: Shard | None, rank: int, size: int) -> tuple[int, ...]:
    """Layers of experts ask this for hundreds of equal parts."""
    if shard is None:
        return shape
    own = shard.span(shape[shard.axis], rank, size).size
    return (*shape[: shard.axis], own, *shape[shard.axis + 1 :])


class DummyRange(NamedTuple):
    """Values uniform in ``[low, high)``; integer formats drop the fraction."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight as an executor sees it: parts concatenated along axis 0, e.g. q, k and v as one matrix ``qkv``.

    Attributes:
        name: ``layers.3.qkv.weight``; models write ``ops.column_linear(x, "layers.3.qkv")``.
        parts: at least one; all have the same trailing dimensions.
        dtype: format in memory, by its safetensors name; None = the engine's compute type.
        dummy: range of the values that seeded random weights take; None = what suits a weight of this name and shape.
    """

    name: str
    parts: tuple[Part, ...]
    dtype: str | None = None
    dummy: DummyRange | None = None

    @property
    def owner(self) -> str:
        """Name that models use: ``layers.3.qkv``."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """What it is of its owner: ``weight``, ``bias``, or a component of a format (``codes``, ``scale``)."""
        return self.name.rpartition(".")[2]

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape on a rank that is alone, padding included."""
        shards = [part.shard for part in self.parts]
        if any(shard is not None and shard.pad_to for shard in shards):
            return self.local_shape(0, 1)
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape on ``rank`` of ``size`` tensor-parallel ranks."""
        shapes = [part.local_shape(rank, size) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def distinct(specs: Iterable[WeightSpec]) -> list[list[WeightSpec]]:
    """Group specs that hold the same data (tied embeddings), so that it is loaded and counted once."""
    groups: dict[tuple[tuple[Part, ...], str | None], list[WeightSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.parts, spec.dtype), []).append(spec)
    return list(groups.values())


def find_stored(names: Sequence[str], present: Collection[str]) -> str | None:
    """The first of ``names``, each with and without its first component, that is in ``present``; None if none is."""
    return next((found for name in names for found in (name, name.partition(".")[2]) if found in present), None)
