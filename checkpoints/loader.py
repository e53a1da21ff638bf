"""From a checkpoint to one rank's weights, a bounded chunk at a time.

The loader walks a weight declaration, reads only the slices that this rank holds and hands them to a `WeightSink`, which
knows where weights live (`phalanx.checkpoints.sinks.NumpySink`: host arrays; the CUDA executor's: device memory). Nothing
larger than one chunk is held besides the sink's own memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from phalanx.checkpoints.dtypes import ITEM_SIZES
from phalanx.checkpoints.dummy import DummySlice, DummySource
from phalanx.checkpoints.resolve import resolve, stored_index
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo, TensorSource, index_shape
from phalanx.checkpoints.spec import Part, WeightSpec, distinct

__all__ = ["DummySink", "LoadReport", "WeightSink", "load_weights"]

Destination = TypeVar("Destination")
_Target = TypeVar("_Target", contravariant=True)


class WeightSink(Protocol[Destination]):
    """Where weights go. The loader calls it from one thread, one weight after the other."""

    @property
    def chunk_bytes(self) -> int:
        """Largest slice that `write` should get, in bytes of the stored format."""
        ...

    def allocate(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Destination:
        """Zero-filled memory for one weight; the loader writes all of it but the padding.

        ``names`` are all names that hold this data (tied weights), usually one.
        """
        ...

    def staging(self, num_bytes: int) -> Buffer:
        """Host memory of at least ``num_bytes`` for the next chunk to be read into, e.g. pinned.

        It must stay untouched until the next `write` returned; a sink that copies asynchronously hands out several in turn.
        """
        ...

    def write(self, destination: Destination, index: Index, array: Array) -> None:
        """Store ``array`` at ``destination[index]`` (``[out, in]`` orientation).

        ``array`` is in the stored format and usually aliases the last `staging` buffer. It is C-contiguous, or for
        transposed sources (GPT-2's Conv1D) its ``.T`` is.
        """
        ...


@runtime_checkable
class DummySink(Protocol[_Target]):
    """A sink that makes dummy weights itself, e.g. on a device, instead of getting them written."""

    def generate(self, destination: _Target, index: Index, dummy: DummySlice) -> None:
        """Fill ``destination[index]`` with the values that `DummySlice` describes."""
        ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: weights made, bytes read from the source (stored format), seconds taken."""

    num_weights: int
    bytes_read: int
    seconds: float


def load_weights(
    source: TensorSource,
    specs: Sequence[WeightSpec],
    tp_rank: int,
    tp_size: int,
    sink: WeightSink[Destination],
    ignored: Sequence[str] = (),
    all_specs: Sequence[WeightSpec] | None = None,
) -> LoadReport:
    """Load what ``tp_rank`` of ``tp_size`` holds of ``specs`` (its pipeline stage) into ``sink``.

    Every tensor is accounted for first: what ``all_specs`` (the whole model, all stages; default ``specs``) declares must
    be in ``source``, and what is in ``source`` must be declared or match a regular expression of ``ignored``.

    Raises:
        CheckpointError: a tensor is missing, unused, of another shape or of a format that weights cannot have.
    """
    start = time.perf_counter()
    all_specs = specs if all_specs is None else all_specs
    if isinstance(source, DummySource):
        source = source.declared(all_specs)
    stored_names = resolve(source, all_specs, ignored)
    groups, bytes_read = distinct(specs), 0
    for parts, group in groups.items():
        destination = sink.allocate(tuple(spec.name for spec in group), group[0].local_shape(tp_rank, tp_size))
        first_row = 0
        for part in parts:
            for piece in _pieces(
                part, source.info(stored_names[part.source]), first_row, tp_rank, tp_size, sink.chunk_bytes
            ):
                bytes_read += _load_piece(source, stored_names[part.source], part.transposed, piece, sink, destination)
            first_row += part.span(0, tp_rank, tp_size).size
    return LoadReport(len(groups), bytes_read, time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk: where it stands in the stored tensor, and in the destination (``[out, in]``)."""

    stored: Index
    local: Index


def _pieces(
    part: Part, info: TensorInfo, first_row: int, tp_rank: int, tp_size: int, chunk_bytes: int
) -> Iterator[_Piece]:
    """What this rank holds of a part, cut along the stored tensor's first axis into chunks of at most ``chunk_bytes``."""
    index = stored_index(part, tp_rank, tp_size)
    shape = index_shape(index)
    if 0 in shape:
        return
    rows_axis = len(shape) - 1 if part.transposed else 0
    rows_each = max(1, chunk_bytes // (math.prod(shape[1:]) * ITEM_SIZES[info.dtype]))
    for low in range(0, shape[0], rows_each):
        high = min(low + rows_each, shape[0])
        stored = (slice(index[0].start + low, index[0].start + high), *index[1:])
        local = [slice(0, extent) for extent in (shape[::-1] if part.transposed else shape)]
        local[rows_axis] = slice(low, high)
        local[0] = slice(first_row + local[0].start, first_row + local[0].stop)
        yield _Piece(stored, tuple(local))


def _load_piece(
    source: TensorSource,
    name: str,
    transposed: bool,
    piece: _Piece,
    sink: WeightSink[Destination],
    destination: Destination,
) -> int:
    num_bytes = math.prod(index_shape(piece.stored)) * ITEM_SIZES[source.info(name).dtype]
    if isinstance(source, DummySource) and isinstance(sink, DummySink):
        sink.generate(destination, piece.local, source.slice(name, piece.stored, transposed))
        return 0
    array = source.read(name, piece.stored, sink.staging(num_bytes))
    sink.write(destination, piece.local, array.T if transposed else array)
    return num_bytes
