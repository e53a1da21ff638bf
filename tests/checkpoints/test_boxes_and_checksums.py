"""Box arithmetic against sets of elements; chunked checksums against zlib over the whole."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.boxes import copies, intersect, relative, subtract
from phalanx.checkpoints.checksum import ChunkedChecksum, combine
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


@given(
    data=st.binary(max_size=200),
    chunk_bytes=st.integers(1, 64),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_checksums_do_not_depend_on_how_bytes_arrive(data: bytes, chunk_bytes: int, cuts: list[int]) -> None:
    checksum = ChunkedChecksum(chunk_bytes)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for low, high in itertools.pairwise(edges):
        checksum.update(np.frombuffer(data[low:high], np.uint8))
    starts = range(0, len(data), chunk_bytes)
    assert checksum.chunks == tuple(zlib.crc32(data[start : start + chunk_bytes]) for start in starts)
    assert checksum.total == zlib.crc32(data)
    assert checksum.num_bytes == len(data)


@given(first=st.binary(max_size=100), zeros=st.integers(0, 100_000))
def test_checksums_combine_over_any_length(first: bytes, zeros: int) -> None:
    second = bytes(zeros)
    assert combine(zlib.crc32(first), zlib.crc32(second), zeros) == zlib.crc32(first + second)
