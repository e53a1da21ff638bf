"""Refusing a model whose weights a rank's memory cannot hold, before a byte of them is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phalanx.checkpoints.formats import FormatPlan, components_of, format_weights
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.memory import weight_bytes

__all__ = ["available_host_bytes", "refuse_what_cannot_fit"]

_GIB = 1 << 30


def available_host_bytes() -> int:
    """Memory that this host can give away without swapping, the page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux has had MemAvailable since 3.14")


def refuse_what_cannot_fit(
    spec: RankSpec, formats: FormatPlan, itemsize: int, available_bytes: int, place: str
) -> None:
    """Raise `ConfigError` on every rank if one of them has less memory than its weights take. *Collective over the replica.*

    Args:
        formats: of the weights in memory.
        itemsize: bytes of a value of a weight without a format.
        available_bytes: this rank's share; ``place`` says of what.
    """
    topology = spec.topology
    declared = spec.model.weights(spec.config, spec.layers, topology.is_first_stage, topology.is_last_stage)
    components = components_of(format_weights(declared, formats))
    needed = sum(weight_bytes(components, spec.tp_rank, spec.tp_size, itemsize).values())
    everywhere = spec.comm.all_gather(np.array([needed, available_bytes], np.int64))
    for rank, (wanted, there) in enumerate(everywhere.tolist()):
        if wanted > there:
            raise ConfigError(
                f"the weights of rank {rank} take {wanted / _GIB:.2f} GiB, but {place} has {there / _GIB:.2f} GiB for it; use "
                "more ranks (--tp, --pp) on more machines or GPUs; launch.plan shows what fits"
            )
