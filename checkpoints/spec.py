"""Weight declarations: what a model needs, where it comes from, how it is split. Pure data, read by everyone.

The loader, the splitter, the memory planner and the TensorRT builder all read the same declaration, so a weight's
sharding is written down once, beside the model that uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phalanx.parallel.sharding import Shard, Span

__all__ = ["Part", "WeightSpec", "distinct"]


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
    """

    source: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    aliases: tuple[str, ...] = ()
    transposed: bool = False
    first_row: int = 0
    source_rows: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape that the source tensor must have in the checkpoint."""
        whole = (self.source_rows or self.shape[0], *self.shape[1:])
        return whole[::-1] if self.transposed else whole

    def span(self, axis: int, rank: int, size: int) -> Span:
        """What ``rank`` of ``size`` holds of ``axis``, relative to the part."""
        extent = self.shape[axis]
        if self.shard is None or self.shard.axis != axis:
            return Span(0, extent, extent)
        return self.shard.span(extent, rank, size)

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of this part on ``rank`` of ``size``, padding included."""
        return tuple(self.span(axis, rank, size).size for axis in range(len(self.shape)))


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight as an executor sees it: parts concatenated along axis 0, e.g. q, k and v as one matrix ``qkv``.

    Attributes:
        name: ``layers.3.qkv.weight``; models write ``ops.column_linear(x, "layers.3.qkv")``.
        parts: at least one; all share the extents behind axis 0.
    """

    name: str
    parts: tuple[Part, ...]

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape on ``rank`` of ``size`` tensor-parallel ranks."""
        shapes = [part.local_shape(rank, size) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def distinct(specs: Iterable[WeightSpec]) -> dict[tuple[Part, ...], list[WeightSpec]]:
    """Group specs that hold the same data (tied embeddings), so that it is loaded and counted once."""
    groups: dict[tuple[Part, ...], list[WeightSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.parts, []).append(spec)
    return groups
