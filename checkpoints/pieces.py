# SPDX-License-Identifier: Apache-2.0
"""One rank's share of a part, cut into chunks: which box to read of the stored tensor, and what of it goes where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phalanx.checkpoints.item_sizes import ITEM_SIZES
from phalanx.checkpoints.resolve import fit_index
from phalanx.checkpoints.source import Array, Index, TensorInfo, index_shape
from phalanx.checkpoints.spec import Part

__all__ = ["Piece", "cut"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk of a part.

    Attributes:
        stored: box of the stored tensor, whole blocks of the part's encoding.
        window: the values wanted, in the source's ``[out, in]`` orientation.
        local: where they go in the destination.
    """

    part: Part
    stored: Index
    window: Index
    local: Index

    def values(self, array: Array) -> Array:
        """What was read at ``stored``, as values ``[out, in]``. C-contiguous, or its ``.T`` is."""
        encoding, blocks = self.part.encoding, self.part.blocks
        if encoding is None:
            return array.T if self.part.transposed else array
        shape = tuple(
            _num_blocks(window, block.values) * block.stored for window, block in zip(self.window, blocks, strict=True)
        )
        array = array.reshape(shape[::-1]).T if self.part.transposed else array.reshape(shape)
        starts = [
            window.start // block.values * block.values for window, block in zip(self.window, blocks, strict=True)
        ]
        wanted = tuple(
            slice(window.start - start, window.stop - start) for window, start in zip(self.window, starts, strict=True)
        )
        return np.ascontiguousarray(encoding.decode(array)[wanted])


def cut(part: Part, info: TensorInfo, first_row: int, rank: int, size: int, chunk_bytes: int) -> Iterator[Piece]:
    """What ``rank`` of ``size`` holds of ``part``, cut along the stored tensor's first axis into whole blocks.

    Chunks have at most ``chunk_bytes`` if a single row of blocks does.

    Args:
        info: of the stored tensor.
        first_row: where the part begins in the destination.
    """
    spans = [part.span(axis, rank, size) for axis in range(len(part.shape))]
    offsets = (part.first_row, *(0 for _ in spans[1:]))
    whole = tuple(slice(first + span.start, first + span.stop) for first, span in zip(offsets, spans, strict=True))
    if 0 in index_shape(whole):
        return
    axis = len(whole) - 1 if part.transposed else 0
    block = part.blocks[axis]
    row_bytes = math.prod(_box_extents(part, whole, without=axis)) * block.stored * ITEM_SIZES[info.dtype]
    step = max(1, chunk_bytes // row_bytes) * block.values
    low = whole[axis].start
    while low < whole[axis].stop:
        high = min(low // block.values * block.values + step, whole[axis].stop)
        window = (*whole[:axis], slice(low, high), *whole[axis + 1 :])
        local = [
            slice(piece.start - all_.start, piece.stop - all_.start) for piece, all_ in zip(window, whole, strict=True)
        ]
        local[0] = slice(first_row + local[0].start, first_row + local[0].stop)
        yield Piece(part, _stored_box(part, window, info.shape), window, tuple(local))
        low = high


def _stored_box(part: Part, window: Index, shape: tuple[int, ...]) -> Index:
    """The blocks that hold ``window``, as an index of a stored tensor of ``shape``."""
    index = tuple(
        slice(values.start // block.values * block.stored, -(-values.stop // block.values) * block.stored)
        for values, block in zip(window, part.blocks, strict=True)
    )
    return fit_index(index[::-1] if part.transposed else index, part.stored_shape, shape)


def _box_extents(part: Part, window: Index, without: int) -> list[int]:
    return [
        _num_blocks(values, block.values) * block.stored
        for axis, (values, block) in enumerate(zip(window, part.blocks, strict=True))
        if axis != without
    ]


def _num_blocks(values: slice, size: int) -> int:
    """Blocks of ``size`` that ``values`` touches."""
    return -(-int(values.stop) // size) - int(values.start) // size
