# SPDX-License-Identifier: Apache-2.0
"""Writing the files of a split's ranks: every piece copied in bounded blocks, summed while it passes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from phalanx.checkpoints.checksum import CHUNK_BYTES, ChunkedChecksum, checksum, combine
from phalanx.checkpoints.dtypes import NUMPY_DTYPES, convert
from phalanx.checkpoints.manifest import Piece, RankFile, rank_file_name
from phalanx.checkpoints.safetensors_layout import FileLayout
from phalanx.checkpoints.source import Buffer, TensorInfo, TensorSource
from phalanx.checkpoints.split_plan import PlannedPiece, PlannedRank

__all__ = ["write_rank_files"]

_Job = Callable[[], Piece]

_BLOCK_BYTES = 1 << 20
"""Copied at once: what was read is still in the processor's cache when it is summed and written."""


def write_rank_files(
    source: TensorSource,
    ranks: Sequence[PlannedRank],
    files: Sequence[FileLayout],
    path: Path,
    threads: int,
    on_written: Callable[[int, int], None],
) -> list[RankFile]:
    """Write the files of ``ranks`` into the directory ``path``; returns their entries of the manifest.

    ``on_written`` is told how many of how many pieces are written.

    Raises:
        CheckpointError: ``source`` cannot be read or converted.
        OSError: a file cannot be written.
    """
    with ExitStack() as descriptors:
        jobs = [_start_file(source, rank, file, path, descriptors) for rank, file in zip(ranks, files, strict=True)]
        pieces = _run(jobs, threads, on_written)
    return [_entry(*each) for each in zip(ranks, files, pieces, strict=True)]


def _start_file(
    source: TensorSource, rank: PlannedRank, file: FileLayout, path: Path, descriptors: ExitStack
) -> list[_Job]:
    """Create a rank's file with its header; one job for each piece."""
    descriptor = _create(path / rank_file_name(rank.rank))
    descriptors.callback(os.close, descriptor)
    _write(descriptor, 0, np.frombuffer(file.header, np.uint8))
    pairs = zip(rank.pieces, file.offsets, strict=True)
    return [partial(_write_piece, source, piece, descriptor, offset) for piece, offset in pairs]


def _run(
    jobs: Sequence[Sequence[_Job]], threads: int, on_written: Callable[[int, int], None]
) -> list[tuple[Piece, ...]]:
    """Results of all jobs; those of different files in turn, because writers of one file wait for each other."""
    with ThreadPoolExecutor(threads) as pool:
        futures: list[list[Future[Piece]]] = [[] for _ in jobs]
        for turn in itertools.zip_longest(*jobs):
            for job, submitted in zip(turn, futures, strict=True):
                if job is not None:
                    submitted.append(pool.submit(job))
        try:
            total = sum(map(len, futures))
            for number, future in enumerate(as_completed(itertools.chain(*futures)), 1):
                future.result()
                on_written(number, total)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C the rest need not be written
    return [tuple(future.result() for future in submitted) for submitted in futures]


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _entry(rank: PlannedRank, file: FileLayout, pieces: tuple[Piece, ...]) -> RankFile:
    header = np.frombuffer(file.header, np.uint8)
    total = combine([checksum(header), *(piece.checksum for piece in pieces)])
    return RankFile(rank.rank, rank.stage, rank.tp_rank, rank_file_name(rank.rank), file.num_bytes, total, pieces)


def _write_piece(source: TensorSource, piece: PlannedPiece, descriptor: int, offset: int) -> Piece:
    """Copy one box, a bounded number of its rows at a time."""
    checksums, dtype = ChunkedChecksum(CHUNK_BYTES), NUMPY_DTYPES[piece.info.dtype]
    first, *rest = piece.box or (slice(0, 1),)
    each = max(1, _BLOCK_BYTES * (first.stop - first.start) // piece.info.num_bytes)
    buffer: Buffer = np.empty(
        min(each, first.stop - first.start) * _row_bytes(source.info(piece.source), rest), np.uint8
    )
    for low in range(first.start, first.stop, each):
        index = (slice(low, min(low + each, first.stop)), *rest) if piece.box else ()
        array = convert(source.read(piece.source, index, buffer), dtype, piece.source)
        data = array.reshape(-1).view(np.uint8)
        _write(descriptor, offset + checksums.num_bytes, data)
        checksums.update(data)
    return Piece(
        name=piece.name,
        source=piece.source,
        start=tuple(part.start for part in piece.box),
        stop=tuple(part.stop for part in piece.box),
        dtype=piece.info.dtype,
        shape=piece.info.shape,
        offset=offset,
        num_bytes=piece.info.num_bytes,
        checksum=combine(checksums.chunks),
        chunk_checksums=checksums.chunks,
    )


def _row_bytes(info: TensorInfo, rest: Sequence[slice]) -> int:
    return TensorInfo(tuple(part.stop - part.start for part in rest), info.dtype).num_bytes


def _write(descriptor: int, offset: int, data: Buffer) -> None:
    view, done = data.data, 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
