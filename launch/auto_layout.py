# SPDX-License-Identifier: Apache-2.0
"""``launch.serve --layout auto``: rank 0 plans as ``launch.plan --optimise throughput`` for the ranks and devices that it finds."""

from __future__ import annotations

import argparse
import json
import logging
from typing import TYPE_CHECKING

from phalanx.launch.layouts import GPUS, Gpu, Load, best_layouts, data_sheet
from phalanx.launch.sharing import agree
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["set_layout"]

_LOG = logging.getLogger("phalanx.serve")
_GIB = 1 << 30
_PROCESSOR = Gpu("processor", flops=1e11, memory=2e10, link=5e9, gib=0)
"""One rank's share of a host, roughly: only the comparison of layouts matters."""
_SAME = ("model", "model_file", "dtype", "quantize", "kv_cache_dtype", "expert_parallel", "max_model_len", "gpu_memory_utilization")  # fmt: skip
_IF_GIVEN = ("max_num_seqs", "max_num_batched_tokens", "block_size")


def set_layout(args: argparse.Namespace, world: Communicator) -> None:
    """Fill in ``args.tp``, ``pp`` and ``dp`` if ``--layout auto`` asks for it. *Collective.*

    Raises:
        ConfigError: sizes are given as well, or no layout fits.
    """
    if args.layout is None:
        return
    given = [f"--{name} {value}" for name in ("tp", "pp", "dp") if (value := getattr(args, name)) is not None]
    if given:
        raise ConfigError(f"--layout auto chooses dp, pp and tp; leave {' and '.join(given)} out, or --layout")
    chosen = json.loads(agree(world, lambda: json.dumps(_choose(args, world.size)).encode()))
    args.tp, args.pp, args.dp = chosen


def _choose(args: argparse.Namespace, num_ranks: int) -> tuple[int, int, int]:
    from phalanx.launch.plan import build_parser, plan
    from phalanx.launch.plan_report import reason

    wanted = build_parser().parse_args([])
    for name in _SAME:
        setattr(wanted, name, getattr(args, name))
    for name in _IF_GIVEN:
        if getattr(args, name) is not None:
            setattr(wanted, name, getattr(args, name))
    gpu, wanted.gpu_memory_gib = _device(args.engine, num_ranks)
    wanted.optimise, wanted.ranks = "throughput", num_ranks
    found = best_layouts(wanted, plan, gpu, Load(wanted.input_len, wanted.output_len), on_this_machine=True)
    best = found[0]
    if best.problem:
        raise ConfigError(f"--layout auto: no layout of {num_ranks} rank(s) fits ({best.problem}); use more ranks")
    _LOG.info("--layout auto: %s", reason("throughput", found))
    return best.tp, best.pp, best.dp


def _device(engine: str, num_ranks: int) -> tuple[Gpu, float]:
    """The data sheet of the first GPU, and the memory of each in GiB."""
    from phalanx.runtime.executors.registry import choose_engine

    if choose_engine(engine) == "numpy":
        from phalanx.runtime.executors.fit import available_host_bytes

        return _PROCESSOR, available_host_bytes() / num_ranks / _GIB
    from phalanx.kernels.device import visible_gpus

    first = visible_gpus()[0]
    return data_sheet(first.name) or GPUS["h100"], first.memory_bytes / _GIB
