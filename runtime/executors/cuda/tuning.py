# SPDX-License-Identifier: Apache-2.0
"""Matrix products of one rank's model, timed once per kind of GPU and kept in the cache directory."""

from __future__ import annotations

from phalanx.kernels.gemm import Gemm
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.executors.cuda.graphs import StepKey
from phalanx.runtime.executors.cuda.stage import CudaStage

__all__ = ["tune_products", "tuned_sizes"]

_SMALLEST_WEIGHT_BYTES = 1 << 20
"""Products with smaller weights take little longer than their launch, whatever the algorithm."""


def tune_products(gemm: Gemm, stage: CudaStage, sizes: list[int], max_logit_rows: int, comm: Communicator) -> None:
    """Time what steps of ``sizes`` tokens multiply, unless that was done before. *Collective.*

    Steps without sequences pose the problems. The first rank of a host times; the others take its results over and add
    what only they need. Run it before memory is given to the cache: it allocates its own operands.
    """
    import cupy

    for size in sizes:
        stage.run(StepKey(size, min(size, max_logit_rows), has_prefill=False))
    problems = [problem for problem in gemm.problems if problem.weight_bytes >= _SMALLEST_WEIGHT_BYTES]
    tuner = GemmTuner(gemm, gemm.timings)
    if launch_info().local_rank == 0:
        tuner.tune(problems)
    comm.barrier()
    if launch_info().local_rank != 0:
        gemm.timings.add({})
        tuner.tune(problems)
    gemm.refresh()
    cupy.get_default_memory_pool().free_all_blocks()


def tuned_sizes(max_num_seqs: int, max_num_tokens: int) -> list[int]:
    """Token counts worth timing: powers of two, and the two sizes that a busy engine computes most."""
    powers = {1 << exponent for exponent in range(max_num_tokens.bit_length())}
    return sorted(powers | {min(max_num_seqs, max_num_tokens), max_num_tokens})
