# SPDX-License-Identifier: Apache-2.0
"""Refusing a model whose weights a rank's memory cannot hold, before a byte of them is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phalanx.checkpoints.formats import FormatPlan
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.weights import stage_weights
from phalanx.runtime.memory import weight_bytes

__all__ = ["available_host_bytes", "largest_converted", "refuse_what_cannot_fit"]

_GIB = 1 << 30


def available_host_bytes() -> int:
    """Memory that this host can give away without swapping, the page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux has had MemAvailable since 3.14")


def largest_converted(spec: RankSpec, formats: FormatPlan, itemsize: int) -> int:
    """Bytes of the largest weight as it is loaded, of those that ``formats`` hold in another form: both are in memory for a moment."""
    converted = [
        weight
        for weight, held in zip(
            spec.declared, stage_weights(spec.model, spec.config, formats, spec.topology), strict=True
        )
        if weight.format != held.format
    ]
    sizes = (weight_bytes([weight], spec.tp_rank, spec.tp_size, itemsize) for weight in converted)
    return max((sum(parts.values()) for parts in sizes), default=0)


def refuse_what_cannot_fit(
    spec: RankSpec, formats: FormatPlan, itemsize: int, available_bytes: int, place: str, loading_bytes: int = 0
) -> None:
    """Raise `ConfigError` on every rank if one of them has less memory than its weights take. *Collective over the replica.*

    Args:
        formats: of the weights in memory.
        itemsize: bytes of a value of a weight without a format.
        available_bytes: this rank's share; ``place`` says of what.
        loading_bytes: what is held besides while the weights are loaded.
    """
    held = stage_weights(spec.model, spec.config, formats, spec.topology)
    needed = sum(weight_bytes(held, spec.tp_rank, spec.tp_size, itemsize).values()) + loading_bytes
    everywhere = spec.comm.all_gather(np.array([needed, available_bytes], np.int64))
    for rank, (wanted, there) in enumerate(everywhere.tolist()):
        if wanted > there:
            raise ConfigError(
                f"the weights of rank {rank} take {wanted / _GIB:.2f} GiB while they are loaded, but {place} has {there / _GIB:.2f} GiB for it; use "
                "more ranks (--tp, --pp) on more machines or GPUs; phalanx plan shows what fits"
            )
