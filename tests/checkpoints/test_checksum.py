"""Chunk checksums: the documented sums, however bytes arrive; what copying gets wrong always shows."""

from __future__ import annotations

import hashlib
import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.checksum import ChunkedChecksum, checksum, combine

ROW = 4096


def expected(data: bytes) -> str:
    """The documented checksum in Python integers."""
    padded = data + bytes(-len(data) % ROW)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    rows = [words[at : at + 512] for at in range(0, len(words), 512)]
    sums = [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * 512
    sums += [sum(row) for row in rows]
    text = b"".join((value % (1 << 64)).to_bytes(8, "little") for value in sums) + len(data).to_bytes(8, "little")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def of(data: bytes) -> str:
    return checksum(np.frombuffer(data, np.uint8))


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


@pytest.mark.parametrize("num_bytes", [1, 7, 8, ROW - 1, ROW, ROW + 1, 3 * ROW + 13])
def test_it_is_the_documented_one(num_bytes: int) -> None:
    assert of(noise(num_bytes)) == expected(noise(num_bytes))
    assert of(b"\xff" * num_bytes) == expected(b"\xff" * num_bytes)


@given(
    num_bytes=st.integers(0, 40_000),
    chunk_bytes=st.sampled_from([100, ROW, ROW + 8, 10_000, 1 << 22]),
    cuts=st.lists(st.integers(0, 40_000), max_size=6),
)
def test_it_does_not_depend_on_how_bytes_arrive(num_bytes: int, chunk_bytes: int, cuts: list[int]) -> None:
    data = noise(num_bytes)
    checksums = ChunkedChecksum(chunk_bytes)
    edges = [0, *sorted(min(cut, num_bytes) for cut in cuts), num_bytes]
    for low, high in itertools.pairwise(edges):
        checksums.update(np.frombuffer(data[low:high], np.uint8))
    assert checksums.num_bytes == num_bytes
    for _ in range(2):  # asking changes nothing
        assert checksums.chunks == tuple(of(data[at : at + chunk_bytes]) for at in range(0, num_bytes, chunk_bytes))


@given(changes=st.lists(st.tuples(st.integers(0, 4 * 512 - 1), st.integers(1, (1 << 64) - 1)), min_size=1, max_size=3))
def test_changes_to_fewer_than_four_words_always_show(changes: list[tuple[int, int]]) -> None:
    words = np.frombuffer(noise(4 * ROW), np.uint64).copy()
    before = checksum(words.view(np.uint8))
    changed = words.copy()
    for position, difference in changes:
        changed[position] ^= np.uint64(difference)
    assert (checksum(changed.view(np.uint8)) == before) == np.array_equal(changed, words)


@pytest.mark.parametrize("block", [8, 64, 512, ROW])
def test_blocks_that_are_swapped_zeroed_or_shifted_show(block: int) -> None:
    data = noise(8 * ROW)
    blocks = [data[at : at + block] for at in range(0, len(data), block)]
    sums = {of(data)}
    variants = (
        [blocks[1], blocks[0], *blocks[2:]],
        [blocks[-1], *blocks[1:-1], blocks[0]],
        [bytes(block), *blocks[1:]],
        [*blocks[1:], blocks[0]],
        [blocks[0], blocks[0], *blocks[2:]],
    )
    for variant in variants:
        sums.add(of(b"".join(variant)))
    assert len(sums) == 1 + len(variants)


def test_zeros_at_the_end_count() -> None:
    assert len({of(bytes(length)) for length in (0, 1, 2, ROW - 1, ROW, ROW + 1)}) == 6


def test_combined_checksums_depend_on_order() -> None:
    first, second = of(b"a"), of(b"b")
    assert combine([first, second]) != combine([second, first])
    assert combine([first]) != first
