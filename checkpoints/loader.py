# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to one rank's weights, a bounded chunk at a time.

The loader walks a weight declaration, reads only the slices that this rank holds and hands them to a `WeightSink`, which
knows where weights live (`phalanx.checkpoints.sinks.NumpySink`: host arrays; the CUDA executor's: device memory). Nothing
larger than one chunk is held in addition to the sink's own memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.checkpoints.dummy import DummySlice, DummySource, decoded
from phalanx.checkpoints.item_sizes import ITEM_SIZES
from phalanx.checkpoints.pieces import Piece, cut
from phalanx.checkpoints.resolve import resolve
from phalanx.checkpoints.source import Array, Buffer, Index, TensorSource, index_shape
from phalanx.checkpoints.spec import WeightSpec, distinct
from phalanx.parallel.errors import CheckpointError

__all__ = ["DummySink", "LoadReport", "WeightSink", "load_weights"]

Destination = TypeVar("Destination")
_Target = TypeVar("_Target", contravariant=True)


class WeightSink(Protocol[Destination]):
    """Where weights go. The loader calls it from one thread, one weight after the other."""

    @property
    def chunk_bytes(self) -> int:
        """Largest slice that `write` should get, in bytes of the stored format."""
        ...

    def allocate(self, names: tuple[str, ...], shape: tuple[int, ...], dtype: str | None) -> Destination:
        """Zero-filled memory for one weight or component; the loader writes all of it but the padding.

        ``names`` are all names that hold this data (tied weights), usually one. ``dtype`` is the safetensors name of a
        component's own format (``I8``), whose values must be kept as they are; None = the compute type, to which the sink
        rounds.
        """
        ...

    def staging(self, num_bytes: int) -> Buffer:
        """Host memory of at least ``num_bytes`` for the next chunk to be read into, e.g. pinned.

        It must stay untouched until the next `write` returned; a sink that copies asynchronously hands out several in turn.
        """
        ...

    def write(self, destination: Destination, index: Index, array: Array) -> None:
        """Store ``array`` at ``destination[index]`` (``[out, in]`` orientation).

        ``array`` is in the stored format and usually aliases the last `staging` buffer; decoded components are in the
        format of `allocate`. It is C-contiguous, or for transposed sources (GPT-2's Conv1D) its ``.T`` is.
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
    on_loaded: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Load what ``tp_rank`` of ``tp_size`` holds of ``specs`` (its pipeline stage) into ``sink``.

    Every tensor is accounted for first: what ``all_specs`` (the whole model, all stages; default ``specs``) declares must
    be in ``source``, and what is in ``source`` must be declared or match a regular expression of ``ignored``.
    ``on_loaded`` is told how many of how many weights are loaded.

    Raises:
        CheckpointError: a tensor is missing, unused, of another shape or of a format that weights cannot have.
    """
    start = time.perf_counter()
    all_specs = specs if all_specs is None else all_specs
    if isinstance(source, DummySource):
        source, specs = source.declared(all_specs), [decoded(spec) for spec in specs]
        all_specs = [decoded(spec) for spec in all_specs]
    stored_names = resolve(source, all_specs, ignored)
    groups, bytes_read = distinct(specs), 0
    for number, group in enumerate(groups, 1):
        names, shape = tuple(spec.name for spec in group), group[0].local_shape(tp_rank, tp_size)
        destination = sink.allocate(names, shape, group[0].dtype)
        first_row = 0
        for part in group[0].parts:
            name = stored_names[part.source]
            for piece in cut(part, source.info(name), first_row, tp_rank, tp_size, sink.chunk_bytes):
                bytes_read += _load_piece(source, name, piece, sink, destination)
            first_row += part.span(0, tp_rank, tp_size).size
        if on_loaded is not None:
            on_loaded(number, len(groups))
    return LoadReport(len(groups), bytes_read, time.perf_counter() - start)


def _load_piece(
    source: TensorSource, name: str, piece: Piece, sink: WeightSink[Destination], destination: Destination
) -> int:
    num_bytes = math.prod(index_shape(piece.stored)) * ITEM_SIZES[source.info(name).dtype]
    is_plain = piece.part.encoding is None and source.info(name).dtype in (*FLOAT_DTYPES, "I8")
    if is_plain and isinstance(source, DummySource) and isinstance(sink, DummySink):
        sink.generate(destination, piece.local, source.slice(name, piece.stored, piece.part.transposed))
        return 0
    array = source.read(name, piece.stored, sink.staging(num_bytes))
    try:
        values = piece.values(array)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name!r}: {error}") from None
    sink.write(destination, piece.local, values)
    return num_bytes
