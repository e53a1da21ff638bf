"""`LLM` on ranks that are threads of the test's process, short of everything, so that requests wait, take turns and are preempted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams

__all__ = ["generate_on_threads", "tokens_of"]


def generate_on_threads(
    directory: Path,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams | Sequence[SamplingParams],
    tp: int = 1,
    pp: int = 1,
    **options: Any,
) -> list[RequestOutput]:
    """Results on the NumPy engine, or another one, of ``tp`` x ``pp`` ranks; ``options`` are those of `LLM`."""

    def rank(comm: Communicator) -> list[RequestOutput]:
        sizes = {"block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 12, "num_kv_blocks": 20}
        settings = {"engine": "numpy", **sizes, **options}
        with LLM(directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, **settings) as llm:
            return llm.generate(list(prompts), params)

    return run_ranks(tp * pp, rank)[0]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    """Generated tokens of each."""
    return [output.token_ids for output in outputs]
