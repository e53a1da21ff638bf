"""Step plans of a small run: three prompts, one of them in two chunks, then decoding; and the NumPy executor's logits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.base import Executor
from phalanx.runtime.executors.numpy.executor import NumpyExecutor
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.weights import load_stage
from phalanx.runtime.models import find_model
from phalanx.runtime.step import ADMISSION, StepLimits, StepPlan, StepResult

Array = np.ndarray[Any, Any]

SLOTS = (4, 0, 2)
PROMPT_LENGTHS = (9, 1, 6)
NUM_DECODE_STEPS = 16


class RecordingNumpyExecutor(NumpyExecutor):
    """The reference, with the logits that it sampled from."""

    def _logits(self, x: Array) -> Array:
        logits = super()._logits(x)
        self.recorded.append(logits)
        return logits

    def _greedy(self, x: Array) -> Array:
        """By whole rows, which are recorded, at any number of ranks."""
        return self._logits(x).argmax(axis=1).astype(np.int32)

    def execute(self, plan: StepPlan) -> None:
        self.recorded: list[Array] = getattr(self, "recorded", [])
        super().execute(plan)


def reference_executor(
    checkpoint: Path, shape: NetworkShape, rounding: str | None = None, comm: Communicator | None = None
) -> RecordingNumpyExecutor:
    """The NumPy executor with one cache block a seq_index, so that it takes the same plans; on one rank, or tensor-parallel over ``comm``."""
    comm = comm or SelfCommunicator()
    topology = Topology(Layout(tp=comm.size), comm.rank)
    with open_checkpoint(checkpoint) as opened:
        model = find_model(opened.config)
        config = model.read_config(opened.config)
        weights = load_stage(opened.source, model, config, opened.formats, topology, NumpySink(rounding=rounding))
    weights = weights.converted(lambda weight: replace(weight, components=weight.format.operand(weight.components)))
    limits = StepLimits(shape.max_num_seqs, shape.max_prefill_tokens, shape.max_model_len, shape.max_model_len, 1)
    return RecordingNumpyExecutor(model, config, weights, topology, comm, limits, shape.max_num_seqs)


def prompts(vocab_size: int) -> list[list[int]]:
    """Fixed random prompts of `PROMPT_LENGTHS`."""
    random = np.random.default_rng(7)
    return [random.integers(0, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def plans(token_ids: Sequence[Sequence[int]]) -> Iterator[StepPlan]:
    """Prefill and decoding of fixed sequences: `PROMPT_LENGTHS` tokens are prompt, the rest is fed one by one.

    The first prompt comes in two chunks, and the second sequence decodes while the third is in prefill.
    """
    yield _plan(0, [(SLOTS[0], 0, 5, 0), (SLOTS[1], 0, 1, 1)][::-1], (1, 0), token_ids, admitted=(0, 1))
    yield _plan(1, [(SLOTS[1], 1, 1, 1), (SLOTS[0], 5, 4, 1), (SLOTS[2], 0, 6, 1)], (1, 0, 2), token_ids, admitted=(2,))
    fed = [length + (1 if sequence == 1 else 0) for sequence, length in enumerate(PROMPT_LENGTHS)]
    for step in range(NUM_DECODE_STEPS):
        rows = [(SLOTS[sequence], fed[sequence] + step, 1, 1) for sequence in (2, 0, 1)]
        yield _plan(2 + step, rows, (2, 0, 1), token_ids)


def _plan(
    step_id: int, rows: Sequence[tuple[int, int, int, int]], sequences: Sequence[int], token_ids: Sequence[Sequence[int]],
    admitted: Sequence[int] = (),
) -> StepPlan:  # fmt: skip
    seq_indices, starts, num_scheduled_tokens, samples = np.array(rows, np.int32).T
    sampled = num_scheduled_tokens.cumsum(dtype=np.int32)[samples > 0] - np.int32(1)
    tokens = [
        token
        for sequence, start, count in zip(sequences, starts.tolist(), num_scheduled_tokens.tolist(), strict=True)
        for token in token_ids[sequence][start : start + count]
    ]
    admissions = np.zeros(len(admitted), ADMISSION)
    admissions["num_logprobs"] = -1
    admissions["seq_index"] = [SLOTS[sequence] for sequence in admitted]
    blocks = np.array([(0, SLOTS[sequence], 0, SLOTS[sequence]) for sequence in admitted], np.int32).reshape(-1, 4)
    return StepPlan.pack(
        step_id, seq_indices, starts, num_scheduled_tokens, np.array(tokens, np.int32), sampled,
        new_blocks=blocks, admissions=admissions,
    )  # fmt: skip


def run(executor: Executor, steps: Sequence[StepPlan], is_leader: bool = True) -> list[StepResult]:
    """Execute all steps, one at a time."""
    results = []
    for plan in steps:
        executor.execute(plan)
        if is_leader:
            results.append(executor.collect())
    return results
