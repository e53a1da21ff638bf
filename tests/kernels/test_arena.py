"""The arena hands out what fits, aligned, once."""

import numpy as np
import pytest

from phalanx.kernels.arena import ALIGNMENT_BYTES, Arena
from phalanx.parallel.errors import ExecutorError


def host_bytes(num_bytes):
    return np.zeros(num_bytes, np.uint8)


def address(array):
    return array.__array_interface__["data"][0]


def test_pieces_are_aligned_disjoint_and_accounted_for():
    arena = Arena(10 * ALIGNMENT_BYTES, host_bytes)
    first = arena.array("first", (3, 5), np.float16)
    second = arena.array("second", (ALIGNMENT_BYTES,), np.int8)
    assert first.shape == (3, 5)
    assert first.dtype == np.float16
    assert address(second) - address(first) == ALIGNMENT_BYTES
    first[...], second[...] = 1, 2
    assert np.all(first == 1)
    assert arena.used_bytes == 2 * ALIGNMENT_BYTES
    assert arena.free_bytes == 8 * ALIGNMENT_BYTES


def test_scratch_gives_the_same_addresses_every_step():
    arena = Arena(16 * ALIGNMENT_BYTES, host_bytes)
    scratch = arena.scratch("activations", 8 * ALIGNMENT_BYTES)

    def step():
        scratch.release()
        kept = scratch.array((100,), np.float32)
        temporary = scratch.array((64,), np.float32)
        return [address(array) for array in (kept, temporary)]

    first = step()
    assert first == step()
    assert scratch.used_bytes == 3 * ALIGNMENT_BYTES
    assert arena.used_bytes == 8 * ALIGNMENT_BYTES


def test_what_does_not_fit_is_refused_with_the_numbers():
    arena = Arena(2 * ALIGNMENT_BYTES, host_bytes)
    with pytest.raises(ExecutorError, match=r"needs 513 bytes, 512 of 512 are left"):
        arena.scratch("activations", 513)
    arena = Arena(2 * ALIGNMENT_BYTES, host_bytes)
    arena.array("a", (512,), np.int8)
    with pytest.raises(ExecutorError, match="'a' is already allocated"):
        arena.array("a", (1,), np.int8)
    with pytest.raises(ExecutorError, match="needs 1 bytes, 0 of 512 are left"):
        arena.array("b", (1,), np.int8)
