# SPDX-License-Identifier: Apache-2.0
"""Reading a slice of a row-major tensor out of a file, with `os.preadv` into memory that the caller owns.

Not memory mapping: mapped pages count as resident memory, and a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import math
import os

import numpy as np

from phalanx.checkpoints.source import Array, Buffer, Index
from phalanx.parallel.errors import CheckpointError

__all__ = ["read_bytes", "read_slice"]

READ_THROUGH_BYTES = 8192
"""A gap between two rows' columns up to this is read too: copying it from the page cache costs less than a system call."""

SCRATCH_BYTES = 1 << 20
"""Memory for reading through gaps."""


def read_bytes(descriptor: int, offset: int, out: Buffer, what: str) -> None:
    """Fill the contiguous ``out`` from ``offset``.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    view, done = out.data.cast("B"), 0
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{what} ended at byte {offset + done} while it was read; copy the file again")
            done += count
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read at byte {offset + done}: {error.strerror}") from None


def read_slice(descriptor: int, offset: int, shape: tuple[int, ...], index: Index, out: Array, what: str) -> None:
    """Fill the C-contiguous ``out`` with ``index`` of the tensor of ``shape`` that starts at byte ``offset``.

    Raises:
        CheckpointError: as `read_bytes`.
    """
    if out.size == 0:
        return
    partial = [axis for axis, part in enumerate(index) if part.stop - part.start != shape[axis]]
    axis = partial[-1] if partial else 0
    if axis > 1:
        _read_each(descriptor, offset, shape, index, out, what)
        return
    inner = math.prod(shape[axis + 1 :]) * out.itemsize
    rows = out.reshape(-1).view(np.uint8).reshape(out.shape[0] if axis else 1, -1)
    pitch = math.prod(shape[1:]) * out.itemsize if axis else 0
    first = offset + (index[0].start * pitch if axis else 0) + (index[axis].start * inner if shape else 0)
    if len(rows) > 1 and pitch - rows.shape[1] <= READ_THROUGH_BYTES:
        _read_through(descriptor, first, pitch, rows, what)
    else:
        for number, row in enumerate(rows):
            read_bytes(descriptor, first + number * pitch, row, what)


def _read_each(descriptor: int, offset: int, shape: tuple[int, ...], index: Index, out: Array, what: str) -> None:
    """Three axes and more: one entry of the first axis after the other."""
    pitch = math.prod(shape[1:]) * out.itemsize
    for number, entry in enumerate(range(index[0].start, index[0].stop)):
        read_slice(descriptor, offset + entry * pitch, shape[1:], index[1:], out[number], what)


def _read_through(descriptor: int, first: int, pitch: int, rows: Buffer, what: str) -> None:
    """Rows of ``pitch`` bytes of which the leading ones are wanted: read bands of whole rows, keep what is wanted."""
    width = rows.shape[1]
    each = max(1, SCRATCH_BYTES // pitch)
    scratch = np.empty((min(each, len(rows)), pitch), np.uint8)
    for low in range(0, len(rows), each):
        band = rows[low : low + each]
        wanted = (len(band) - 1) * pitch + width
        read_bytes(descriptor, first + low * pitch, scratch.reshape(-1)[:wanted], what)
        band[...] = scratch[: len(band), :width]
