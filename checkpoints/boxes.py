# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on index boxes: which part of a tensor a piece holds, what is left, how often each element is held."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from phalanx.checkpoints.source import Index

__all__ = ["copies", "intersect", "relative", "subtract"]

_Corners = tuple[tuple[int, int], ...]


def intersect(a: Index, b: Index) -> Index | None:
    """The box that both hold; None if there is no element in it."""
    both = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return both if all(part.start < part.stop for part in both) else None


def relative(box: Index, origin: Index) -> Index:
    """``box`` counted from the start of ``origin``."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, origin, strict=True))


def subtract(a: Index, b: Index) -> list[Index]:
    """Disjoint boxes that make up ``a`` without ``b``, which lies inside it."""
    rest: list[Index] = []
    for axis, (x, y) in enumerate(zip(a, b, strict=True)):
        for part in (slice(x.start, y.start), slice(y.stop, x.stop)):
            if part.start < part.stop:
                rest.append((*b[:axis], part, *a[axis + 1 :]))
    return rest


def copies(shape: Sequence[int], boxes: Iterable[Index]) -> Mapping[int, int]:
    """How often elements of a tensor of ``shape`` are held by ``boxes``: number of copies to number of elements."""
    counted = Counter(tuple((part.start, part.stop) for part in box) for box in boxes)
    return _copies(tuple(shape), tuple(sorted(counted.items())))


@functools.lru_cache(maxsize=1024)  # the layers of a model are alike
def _copies(shape: tuple[int, ...], counted: tuple[tuple[_Corners, int], ...]) -> Mapping[int, int]:
    cuts = [sorted({0, extent}.union(*(box[axis] for box, _ in counted))) for axis, extent in enumerate(shape)]
    result: Counter[int] = Counter()
    for cell in itertools.product(*(list(itertools.pairwise(edges)) for edges in cuts)):
        holders = sum(
            number
            for box, number in counted
            if all(low <= start and stop <= high for (low, high), (start, stop) in zip(box, cell, strict=True))
        )
        result[holders] += math.prod(stop - start for start, stop in cell)
    return MappingProxyType(dict(result))
