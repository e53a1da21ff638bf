"""Writing a split: every rank's slices into a file of their own, with a manifest that says what is where.

The slices stay in the checkpoint's orientation and names, so that any layout can be put together again from any other
(`phalanx.checkpoints.split_source`). Work is shared by the ranks of a communicator, one file each in turn, and by threads
within a rank, one piece each in turn.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phalanx.checkpoints.checksum import CHUNK_BYTES, ChunkedChecksum, combine
from phalanx.checkpoints.config_files import CONFIG_FILE, COPIED_FILES
from phalanx.checkpoints.coverage import planned_copies, verify_coverage
from phalanx.checkpoints.dtypes import FLOAT_DTYPES, convert
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import (
    FORMAT,
    MANIFEST_FILE,
    VERSION,
    Manifest,
    Piece,
    RankFile,
    SourceTensor,
    SplitLayout,
    rank_file_name,
)
from phalanx.checkpoints.partial_directory import PartialDirectory
from phalanx.checkpoints.safetensors_layout import FileLayout, plan_file
from phalanx.checkpoints.source import Buffer, TensorInfo, TensorSource
from phalanx.checkpoints.split_plan import PlannedPiece, PlannedRank, SplitJob, plan_ranks
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError

__all__ = ["SplitReport", "split_checkpoint"]

_BLOCK_BYTES = 1 << 20
"""Copied at once: what was read is still in the processor's cache when it is summed and written."""

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What a split wrote, over all ranks; ``replaced_leftovers`` of an interrupted one."""

    num_files: int
    num_bytes: int
    replaced_leftovers: bool


def split_checkpoint(
    source: TensorSource,
    directory: ModelDirectory,
    job: SplitJob,
    output: Path,
    comm: Communicator,
    threads: int = 1,
) -> SplitReport:
    """Write ``source`` as a split at ``output``. *Collective over ``comm``.*

    Args:
        directory: where configuration and tokenizer files are copied from.
        threads: how many pieces this rank copies at once.

    Raises:
        ConfigError: ``output`` exists or cannot be written, or the model cannot be split so.
        CheckpointError: ``source`` does not hold what the job declares, or cannot be read.
    """
    stored_names, ranks = plan_ranks(source, job)
    files = [_layout(rank, job) for rank in ranks]
    unfinished = PartialDirectory(output, _is_ours)
    is_first = comm.rank == 0
    replaced = unfinished.create() if is_first else False
    try:
        if is_first:
            _check_space(unfinished.path, sum(file.num_bytes for file in files))
        comm.barrier()
        mine = slice(comm.rank, None, comm.size)
        entries = _gather(_write_ranks(source, ranks[mine], files[mine], unfinished.path, threads), comm)
        if is_first:
            _copy_files(directory, unfinished.path, job.dtype)
            _write_manifest(_manifest(source, stored_names, job, entries), unfinished.path)
            unfinished.commit()
    except OSError as error:
        unfinished.discard()
        raise ConfigError(f"cannot write {str(unfinished.path)!r}: {error.strerror}; nothing was left there") from error
    except BaseException:
        unfinished.discard()
        raise
    comm.barrier()
    return SplitReport(len(files), sum(file.num_bytes for file in files), replaced)


def _is_ours(name: str) -> bool:
    return name in (MANIFEST_FILE, *COPIED_FILES) or re.fullmatch(r"rank_\d+\.safetensors", name) is not None


def _layout(rank: PlannedRank, job: SplitJob) -> FileLayout:
    metadata = {
        "format": FORMAT,
        "rank": str(rank.rank),
        "tp": str(job.tp_size),
        "pp": str(len(job.stages)),
    }
    return plan_file([(piece.name, piece.info) for piece in rank.pieces], metadata)


def _check_space(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise ConfigError(
            f"--output needs {num_bytes} bytes, but {str(path.parent)!r} has {free} left; use another disk"
        )


def _write_ranks(
    source: TensorSource, ranks: Sequence[PlannedRank], files: Sequence[FileLayout], path: Path, threads: int
) -> list[RankFile]:
    """Write the files of ``ranks``; pieces of different files in turn, because writers of one file wait for each other."""
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        jobs: list[list[Callable[[], Piece]]] = []
        for rank, file in zip(ranks, files, strict=True):
            descriptor = _create(path / rank_file_name(rank.rank), file.num_bytes)
            stack.callback(os.close, descriptor)
            _write(descriptor, 0, np.frombuffer(file.header, np.uint8))
            pairs = zip(rank.pieces, file.offsets, strict=True)
            jobs.append([partial(_write_piece, source, piece, descriptor, offset) for piece, offset in pairs])
        futures: list[list[Future[Piece]]] = [[] for _ in jobs]
        for turn in itertools.zip_longest(*jobs):
            for job, done in zip(turn, futures, strict=True):
                if job is not None:
                    done.append(pool.submit(job))
        return [
            _entry(rank, file, tuple(future.result() for future in done))
            for rank, file, done in zip(ranks, files, futures, strict=True)
        ]


def _create(path: Path, num_bytes: int) -> int:
    """A new file with its space reserved, which makes writing cheaper and a full disk show at once."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(descriptor)
            raise
    return descriptor


def _entry(rank: PlannedRank, file: FileLayout, pieces: tuple[Piece, ...]) -> RankFile:
    checksum = zlib.crc32(file.header)
    for piece in pieces:
        checksum = combine(checksum, piece.checksum, piece.num_bytes)
    name = rank_file_name(rank.rank)
    return RankFile(rank.rank, rank.stage, rank.tp_rank, name, file.num_bytes, checksum, pieces)


def _write_piece(source: TensorSource, piece: PlannedPiece, descriptor: int, offset: int) -> Piece:
    """Copy one box, a bounded number of its rows at a time."""
    checksum, dtype = ChunkedChecksum(CHUNK_BYTES), FLOAT_DTYPES[piece.info.dtype]
    first, *rest = piece.box or (slice(0, 1),)
    each = max(1, _BLOCK_BYTES * (first.stop - first.start) // piece.info.num_bytes)
    buffer: Buffer = np.empty(
        min(each, first.stop - first.start) * _row_bytes(source.info(piece.source), rest), np.uint8
    )
    for low in range(first.start, first.stop, each):
        index = (slice(low, min(low + each, first.stop)), *rest) if piece.box else ()
        array = convert(source.read(piece.source, index, buffer), dtype, piece.source)
        data = array.reshape(-1).view(np.uint8)
        _write(descriptor, offset + checksum.num_bytes, data)
        checksum.update(data)
    return Piece(
        name=piece.name,
        source=piece.source,
        start=tuple(part.start for part in piece.box),
        stop=tuple(part.stop for part in piece.box),
        dtype=piece.info.dtype,
        shape=piece.info.shape,
        offset=offset,
        num_bytes=piece.info.num_bytes,
        checksum=checksum.total,
        chunk_checksums=checksum.chunks,
    )


def _row_bytes(info: TensorInfo, rest: Sequence[slice]) -> int:
    return TensorInfo(tuple(part.stop - part.start for part in rest), info.dtype).num_bytes


def _write(descriptor: int, offset: int, data: Buffer) -> None:
    view, done = data.data, 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _gather(entries: Sequence[RankFile], comm: Communicator) -> list[RankFile]:
    """All ranks' entries, in order of rank. *Collective.*"""
    data = np.frombuffer(msgspec.msgpack.encode(entries), np.uint8)
    sizes = comm.all_gather(np.array([len(data)]))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    everyone = comm.all_gather(padded)
    lists = [
        msgspec.msgpack.decode(row[:size].tobytes(), type=list[RankFile])
        for row, size in zip(everyone, sizes, strict=True)
    ]
    return sorted((entry for entries in lists for entry in entries), key=lambda entry: entry.rank)


def _manifest(
    source: TensorSource, stored_names: Mapping[str, str], job: SplitJob, entries: Sequence[RankFile]
) -> Manifest:
    sources = {}
    for name, counts in planned_copies(job.stages, job.tp_size).items():
        info = source.info(stored_names[name])
        copies = {str(number): elements for number, elements in counts.items()}
        sources[stored_names[name]] = SourceTensor(info.shape, job.dtype or info.dtype, copies)
    layout = SplitLayout(job.tp_size, len(job.stages))
    manifest = Manifest(FORMAT, VERSION, job.architecture, layout, CHUNK_BYTES, sources, tuple(entries))
    verify_coverage(manifest)
    return manifest


def _write_manifest(manifest: Manifest, path: Path) -> None:
    text = msgspec.json.encode(manifest)
    (path / MANIFEST_FILE).write_bytes(text)


def _copy_files(directory: ModelDirectory, path: Path, dtype: str | None) -> None:
    for name in COPIED_FILES:
        if directory.has(name):
            data = directory.read(name, 1 << 30)
            (path / name).write_bytes(_with_dtype(directory, dtype) if dtype and name == CONFIG_FILE else data)


def _with_dtype(directory: ModelDirectory, dtype: str) -> bytes:
    """``config.json`` with the format that the weights were converted to."""
    config: dict[str, Any] = directory.read_json(CONFIG_FILE)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return json.dumps(config | dict.fromkeys(keys, _DTYPE_NAMES[dtype]), indent=2).encode() + b"\n"
