# SPDX-License-Identifier: Apache-2.0
"""The only place that divides anything by a number of ranks.

A `Shard` is declared data: which axis of a weight is split and in which indivisible units (heads, quantisation
groups). `Shard.span` turns it into the range that one rank holds. Megatron-LM's scheme (Shoeybi et al. 2019,
arXiv:1909.08053): the first matrix of a pair is split along its outputs, the second along its inputs, and one all-reduce
follows each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.parallel.errors import ConfigError

__all__ = [
    "Shard",
    "Span",
    "expert_shard",
    "local_experts",
    "local_heads",
    "local_kv_heads",
    "stage_layers",
]


@dataclass(frozen=True, slots=True)
class Span:
    """What one rank holds of an axis: source range ``[start, stop)``, then zeros up to ``size``."""

    start: int
    stop: int
    size: int

    @property
    def padding(self) -> int:
        """Rows of zeros after the source rows."""
        return self.size - (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Shard:
    """How an axis is split over tensor-parallel ranks.

    Attributes:
        axis: the axis of the stored ``[out, in]`` weight that is split.
        unit: extent of one indivisible unit, e.g. ``head_dim``.
        groups: number of equal groups that the units come in, e.g. key/value heads for query heads. Ranks hold whole
            groups when there are enough, some one more than others where the numbers do not divide; with fewer groups
            than ranks, the ranks of a group, of which some have one more, divide its units (as evenly as whole units
            allow) or, with ``copy``, each hold all of them. 0: any split in whole units.
        copy: hold the whole group on each of its ranks (key/value heads fewer than ranks).
        pad_to: every rank's extent is rounded up to a multiple of this, zeros at the end, so that any number of ranks
            works (vocabulary). 0: no padding.
        has_short_last: the last unit may be shorter than the others (688 columns in quantisation groups of 128).
        start, whole: the axis is a piece, from unit ``start`` on, of ``whole`` units that are split together (one head of a
            matrix that a checkpoint stores head by head); a rank may then hold none of it. 0: the axis is all there is.
        what: the field's name for the units, used in errors.
    """

    axis: int
    unit: int = 1
    groups: int = 0
    copy: bool = False
    pad_to: int = 0
    what: str = "units"
    has_short_last: bool = False
    start: int = 0
    whole: int = 0

    def span(self, extent: int, rank: int, size: int) -> Span:
        """Range of an axis of ``extent`` that ``rank`` of ``size`` holds.

        Raises:
            ConfigError: the units cannot be shared by ``size`` ranks.
        """
        if self.pad_to:
            return self._padded(extent, rank, size)
        units, rest = divmod(extent, self.unit)
        if rest and self.has_short_last:
            units += 1
        elif rest:
            raise ConfigError(f"extent {extent} is not a multiple of the unit {self.unit} ({self.what})")
        total = self.whole or units
        if 0 < total < size and not self.copy:
            raise ConfigError(
                f"{total} {self.what} cannot be shared by tp_size={size}; use a tp_size of at most {total}"
            )
        start, stop = self._grouped(total, rank, size) if self.groups else _even(total, rank, size)
        if self.whole:
            start = min(max(start - self.start, 0), units)
            stop = max(min(stop - self.start, units), start)
        start, stop = start * self.unit, min(stop * self.unit, extent)
        return Span(start, stop, stop - start)

    def _padded(self, extent: int, rank: int, size: int) -> Span:
        each = -(-extent // (size * self.pad_to)) * self.pad_to
        return Span(min(rank * each, extent), min((rank + 1) * each, extent), each)

    def copies(self, extent: int, size: int) -> dict[int, int]:
        """How many elements of an axis of ``extent`` are held by how many of ``size`` ranks."""
        if not self.copy or size <= self.groups:
            return {1: extent}
        units = extent // self.unit
        per_group = (self.whole or units) // self.groups
        result: dict[int, int] = {}
        for group in range(self.groups):
            first, last = _even(size, group, self.groups)
            low, high = max(group * per_group, self.start), min((group + 1) * per_group, self.start + units)
            if high > low:
                result[last - first] = result.get(last - first, 0) + (high - low) * self.unit
        return result

    def _grouped(self, units: int, rank: int, size: int) -> tuple[int, int]:
        per_group = units // self.groups
        if size <= self.groups:
            first, last = _even(self.groups, rank, size)
            return first * per_group, last * per_group
        group = ((rank + 1) * self.groups - 1) // size  # the one whose share of the ranks holds this one
        first, last = _even(size, group, self.groups)
        low, high = (0, per_group) if self.copy else _even(per_group, rank - first, last - first)
        return group * per_group + low, group * per_group + high


def _even(units: int, rank: int, size: int) -> tuple[int, int]:
    return rank * units // size, (rank + 1) * units // size


def local_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> Span:
    """Query heads of one rank: of whole key/value heads, or where these are too few a part of one head's."""
    return Shard(0, groups=num_kv_heads, what="query heads").span(num_heads, rank, size)


def local_kv_heads(num_kv_heads: int, rank: int, size: int) -> Span:
    """Key/value heads of one rank; heads are copied when there are fewer than ranks."""
    return Shard(0, groups=num_kv_heads, copy=True, what="key/value heads").span(num_kv_heads, rank, size)


def expert_shard(rows: int, number: int, num_experts: int) -> Shard:
    """Rows of expert ``number`` in a stack of ``num_experts`` with ``rows`` rows each, of which a rank holds some whole."""
    return Shard(0, unit=rows, start=number, whole=num_experts, what="experts")


def local_experts(num_experts: int, num_held: int, rank: int, size: int) -> range:
    """Numbers of the ``num_held`` experts whose matrices ``rank`` holds: all of them, or by `expert_shard` its own."""
    if num_held == num_experts:
        return range(num_experts)
    span = Shard(0, what="experts").span(num_experts, rank, size)
    assert span.size == num_held, "a rank's experts are those that expert_shard gives it"
    return range(span.start, span.stop)


def stage_layers(costs: Sequence[int], head_cost: int, num_stages: int) -> tuple[range, ...]:
    """Layers of each pipeline stage, so that the stage with the most to do has as little as possible; the last has the head, too.

    Among such divisions earlier stages hold more. Whole numbers in, so that every rank finds the same.

    Args:
        costs: of each layer, in any unit.
        head_cost: of what follows the last layer, in the same unit.

    Raises:
        ConfigError: a stage would have no layer.
    """
    num_layers = len(costs)
    if num_layers < num_stages:
        raise ConfigError(
            f"num_layers={num_layers} cannot fill pp_size={num_stages} stages; use a pp_size of at most {num_layers}"
        )
    limit = _least_limit(costs, head_cost, num_stages)
    stages, start, left = [], 0, sum(costs) + head_cost
    for num_left in range(num_stages, 1, -1):
        stop, cost = start + 1, costs[start]
        # At least an even share of what is left, within the limit, and no more than leaves every later stage a layer.
        while cost * num_left < left and cost + costs[stop] <= limit and num_layers - stop >= num_left:
            cost += costs[stop]
            stop += 1
        while not _fits(costs[stop:], head_cost, num_left - 1, limit):
            cost += costs[stop]
            stop += 1
        stages.append(range(start, stop))
        start, left = stop, left - cost
    return (*stages, range(start, num_layers))


def _least_limit(costs: Sequence[int], head_cost: int, num_stages: int) -> int:
    low, high = 0, sum(costs) + head_cost
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(costs, head_cost, num_stages, middle) else (middle + 1, high)
    return low


def _fits(costs: Sequence[int], head_cost: int, num_stages: int, limit: int) -> bool:
    """Whether ``num_stages`` stages of at least one layer can each stay within ``limit``; fills them from the head backwards."""
    if len(costs) < num_stages or head_cost + costs[-1] > limit:
        return False
    num_used, cost = 1, head_cost + costs[-1]
    for layer_cost in reversed(costs[:-1]):
        if cost + layer_cost > limit:
            num_used, cost = num_used + 1, 0
        cost += layer_cost
        if cost > limit:
            return False
    return num_used <= num_stages
