"""Time of an all-reduce between the GPUs of one host: our kernels against NCCL, calls of a CUDA graph one after the other.

    mpirun -n R python tests/gpu/bench_all_reduce.py [--json FILE] [--tune]

The slowest rank's median over replays, in microseconds a call, float16. ``--tune`` times other numbers of blocks and threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import cupy
import numpy as np

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.all_reduce import Launch, all_reduce, choose_launch
from phalanx.kernels.library import KernelLibrary
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.mpi_comm import world_communicator
from phalanx.parallel.nccl_comm import NcclCommunicator
from phalanx.runtime.executors.cuda.all_reduce import open_peer_all_reduce

SIZES = [8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20, 32 << 20, 64 << 20]
NUM_REPLAYS = 9


def microseconds(comm: Communicator, call: Callable[[], object], num_calls: int) -> float:
    stream = cupy.cuda.get_current_stream()
    call()
    stream.synchronize()
    stream.begin_capture()
    for _ in range(num_calls):
        call()
    graph = stream.end_capture()
    samples = []
    for _ in range(NUM_REPLAYS):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        stream.synchronize()
        comm.barrier()
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        samples.append(1e3 * cupy.cuda.get_elapsed_time(start, stop) / num_calls)
    return float(comm.all_gather(np.array([statistics.median(samples[2:])])).max())


def launches(num_vectors: int, comm: Communicator, num_multiprocessors: int) -> dict[str, Launch]:
    tried = {}
    for two_shot in (False, True):
        num_items = -(-num_vectors // comm.size) if two_shot else num_vectors
        for num_threads in (128, 256, 512, 1024):
            for most_blocks in (16, 32, 64, num_multiprocessors):
                num_blocks = min(most_blocks, -(-num_items // num_threads))
                name = f"{'two' if two_shot else 'one'}-shot {num_blocks} x {num_threads}"
                tried[name] = Launch(two_shot, num_blocks, num_threads)
    return tried


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    comm = world_communicator()
    device = cupy.cuda.Device(comm.rank)
    device.use()
    rows: list[dict[str, Any]] = []
    with device, cupy.cuda.Stream(non_blocking=True):
        library, nccl = KernelLibrary(), NcclCommunicator(comm)
        peers = open_peer_all_reduce(library, comm)
        assert not isinstance(peers, str), peers
        x = cupy.full(SIZES[-1] // 2, 1e-4 * (comm.rank + 1), np.float16)
        for size in SIZES:
            part = x[: size // 2]
            num_calls = 50 if size <= 1 << 20 else 10
            row = {"bytes": size, "nccl": microseconds(comm, partial(nccl.all_reduce, part), num_calls)}
            if peers.fits(part):
                row["own"] = microseconds(comm, partial(peers, part), num_calls)
                row["launch"] = str(choose_launch(size // 16, comm.size, library.num_multiprocessors))
            if options.tune:
                row["tried"] = tune(comm, library, part, peers.exchange, num_calls)
            rows.append(row)
            if comm.rank == 0:
                print(json.dumps(row), flush=True)
        peers.close()
        nccl.close()
    if comm.rank == 0 and options.json:
        options.json.write_text(json.dumps({"gpus": comm.size, "dtype": "float16", "rows": rows}, indent=1))
    comm.close()


def tune(comm: Communicator, library: KernelLibrary, x: Any, exchange: Any, num_calls: int) -> dict[str, float]:
    times = {}
    for name, shape in launches(x.nbytes // 16, comm, library.num_multiprocessors).items():
        with contextlib.suppress(ExecutorError):  # the buffers are too small for one-shot
            call = partial(all_reduce, library, x, exchange, shape)
            times[name] = round(microseconds(comm, call, num_calls), 2)
    return dict(sorted(times.items(), key=lambda item: item[1])[:8])


if __name__ == "__main__":
    main()
