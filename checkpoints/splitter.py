# SPDX-License-Identifier: Apache-2.0
"""Write a split: one file of slices per rank, and a manifest that says what is where.

The slices stay in the checkpoint's orientation and names, so that any layout can be put together again from any other
(`phalanx.checkpoints.split_source`). Work is shared by the ranks of a communicator, one file each in turn, and by threads
within a rank, one piece each in turn.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phalanx.checkpoints.checksum import CHUNK_BYTES
from phalanx.checkpoints.config_files import (
    CONFIG_FILE,
    COPIED_FILES,
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOOL_TEMPLATE,
)
from phalanx.checkpoints.coverage import planned_copies, verify_coverage
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import (
    FORMAT,
    MANIFEST_FILE,
    VERSION,
    Manifest,
    RankFile,
    SourceTensor,
    SplitLayout,
)
from phalanx.checkpoints.partial_directory import PartialDirectory
from phalanx.checkpoints.rank_files import write_rank_files
from phalanx.checkpoints.safetensors_layout import FileLayout, plan_file
from phalanx.checkpoints.source import TensorInfo, TensorSource
from phalanx.checkpoints.split_plan import PlannedRank, SplitJob, plan_ranks
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError

__all__ = ["SplitReport", "split_checkpoint"]

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
    on_written: Callable[[int, int], None] = lambda _done, _total: None,
) -> SplitReport:
    """Write ``source`` as a split at ``output``. *Collective over ``comm``.*

    Args:
        directory: where configuration and tokenizer files are copied from.
        threads: how many pieces this rank copies at once.
        on_written: told how many of how many pieces this rank has written.

    Raises:
        ConfigError: ``output`` exists or cannot be written, or the model cannot be split so.
        CheckpointError: ``source`` does not hold what the job declares, or cannot be read.
    """
    stored_names, ranks = plan_ranks(source, job)
    infos = _stored_infos(source, ranks)
    files = [_layout(rank, job) for rank in ranks]
    unfinished = PartialDirectory(output, _is_ours)
    unfinished.require_absent()
    is_first = comm.rank == 0
    with unfinished.removed_after_failure():
        replaced = unfinished.create() if is_first else False
        if is_first:
            _check_space(unfinished.path, sum(file.num_bytes for file in files))
        comm.barrier()
        mine = slice(comm.rank, None, comm.size)
        written = write_rank_files(source, ranks[mine], files[mine], unfinished.path, threads, on_written)
        entries = _gather(written, comm)
        if is_first:
            _copy_files(directory, unfinished.path, job.dtype)
            _write_manifest(_manifest(infos, stored_names, job, entries), unfinished.path)
            unfinished.commit()
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


def _stored_infos(source: TensorSource, ranks: Sequence[PlannedRank]) -> dict[str, TensorInfo]:
    """Every source tensor as the split stores it."""
    dtypes = {piece.source: piece.info.dtype for rank in ranks for piece in rank.pieces}
    return {name: TensorInfo(source.info(name).shape, dtype) for name, dtype in dtypes.items()}


def _manifest(
    infos: Mapping[str, TensorInfo], stored_names: Mapping[str, str], job: SplitJob, entries: Sequence[RankFile]
) -> Manifest:
    sources = {}
    for name, counts in planned_copies(job.stages, job.tp_size).items():
        info = infos[stored_names[name]]
        copies = {str(number): elements for number, elements in counts.items()}
        sources[stored_names[name]] = SourceTensor(info.shape, info.dtype, copies)
    layout = SplitLayout(job.tp_size, len(job.stages), tuple((layers.start, layers.stop) for layers in job.layers))
    manifest = Manifest(FORMAT, VERSION, job.architecture, layout, CHUNK_BYTES, sources, tuple(entries), job.model_code)
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
    templates = directory.subdirectory(TEMPLATE_FOLDER)
    for name, copy in ((DEFAULT_TEMPLATE, TEMPLATE_FILE), (TOOL_TEMPLATE, TOOL_TEMPLATE)):
        if templates.has(name) and not (path / copy).exists():  # a split has no subdirectories
            (path / copy).write_bytes(templates.read(name))


def _with_dtype(directory: ModelDirectory, dtype: str) -> bytes:
    """``config.json`` with the format that the weights were converted to."""
    config: dict[str, Any] = directory.read_json(CONFIG_FILE)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return json.dumps(config | dict.fromkeys(keys, _DTYPE_NAMES[dtype]), indent=2).encode() + b"\n"
