"""Box arithmetic against sets of elements."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.boxes import copies, intersect, relative, subtract
from phalanx.checkpoints.source import Index

SHAPE = (6, 5)


def elements(box: Index) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(part.start, part.stop) for part in box)))


@st.composite
def boxes(draw: st.DrawFn) -> Index:
    corners = [sorted(draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))) for extent in SHAPE]
    return tuple(slice(low, max(high, low + 1) if low < extent else high) for (low, high), extent in zip(corners, SHAPE, strict=True))  # fmt: skip


@given(a=boxes(), b=boxes())
def test_intersection_and_difference_hold_the_right_elements(a: Index, b: Index) -> None:
    both = intersect(a, b)
    assert (elements(both) if both else set()) == elements(a) & elements(b)
    if both is None:
        return
    rest = subtract(a, both)
    assert sum(len(elements(part)) for part in rest) == len(elements(a) - elements(b))
    assert set().union(*(elements(part) for part in rest)) == elements(a) - elements(b)
    whole = np.arange(30).reshape(SHAPE)
    np.testing.assert_array_equal(whole[a][relative(both, a)], whole[both])


@given(held=st.lists(boxes(), max_size=6))
def test_copies_counts_every_element(held: list[Index]) -> None:
    counts = Counter(element for box in held for element in elements(box))
    expected = Counter(counts[element] for element in itertools.product(*map(range, SHAPE)))
    assert copies(SHAPE, held) == dict(expected)
