# SPDX-License-Identifier: Apache-2.0
"""The NumPy executor: one rank's shard on a processor. The reference for every other executor."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.sharding import Span
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.base import CacheSize, refuse_other_passes
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.ops import NumpyOps, NumpyStep
from phalanx.runtime.executors.numpy.threads import Threads, thread_count
from phalanx.runtime.executors.scored_logits import LogitsReader, show_scored
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.memory import LOGIT_ROWS
from phalanx.runtime.models import Model
from phalanx.runtime.models.base import vocabulary_shard
from phalanx.runtime.sampling.adjust import adjust_logits
from phalanx.runtime.sampling.fields import adjusts_logits
from phalanx.runtime.sampling.reference import log_softmax, sample, top_logprobs
from phalanx.runtime.step import BatchState, StepLimits, StepPlan, StepResult, TokenHistory
from phalanx.runtime.step.times import DeviceTimes, StepTimes

__all__ = ["NumpyExecutor"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

_HIDDEN_TAG, _RESULT_TAG = 1, 2


class NumpyExecutor:
    """Runs planned steps in float32 on the host's processor, one at a time.

    Args:
        weights: this rank's shard of its stage, dense.
        comm: all ranks of the replica; the tensor and pipeline groups are split off. *Collective.*
        num_kv_blocks: N, equal on all ranks.
    """

    lookahead = 0
    step_times: StepTimes | None = None
    device_times: DeviceTimes | None = None

    def __init__(
        self, model: Model, config: ModelConfig, weights: Weights[Float32Array], topology: Topology,
        comm: Communicator, limits: StepLimits, num_kv_blocks: int,
        kv_scales: Mapping[int, Float32Array] | None = None,
    ) -> None:  # fmt: skip
        self._config, self._topology = config, topology
        self._tp, self._pp = comm.split(topology.tp_group), comm.split(topology.pp_group)
        self._layers = model.stages(config, topology.layout.pp)[topology.stage]
        rank, size = topology.tp_rank, topology.layout.tp
        self._vocabulary: Span = vocabulary_shard().span(config.vocab_size, rank, size)
        threads = Threads(thread_count())
        self._pass = model.decode
        specs = {layer: self._pass.attention(config, layer) for layer in self._layers}
        self._attention = NumpyAttention(
            specs, num_kv_blocks, limits.block_size, rank, size, limits.max_model_len, threads, kv_scales
        )
        self._ops = NumpyOps(weights, self._vocabulary, self._tp, self._attention, threads)
        self._state = BatchState.empty(limits.max_num_seqs, limits.blocks_per_seq)
        self._history = TokenHistory(self._state, num_kv_blocks, limits.block_size)
        self._results: deque[StepResult] = deque()
        self._expected: deque[int] = deque()
        self.logits_reader: LogitsReader | None = None
        self.cache = CacheSize("paged", num_kv_blocks, limits.block_size)

    @property
    def device(self) -> str:
        """The processor and the threads that BLAS may use."""
        return f"{_processor_name()}, {thread_count()} thread(s) per rank"

    @property
    def num_saturated(self) -> int:
        return self._attention.num_saturated

    @property
    def depth(self) -> int:
        """One step per pipeline stage."""
        return self._topology.layout.pp

    @property
    def num_microbatches(self) -> int:
        """One per pipeline stage."""
        return self._topology.layout.pp

    def execute(self, plan: StepPlan) -> None:
        """Compute this rank's stage of ``plan`` and hand the result on. *Collective over the replica.*"""
        refuse_other_passes(plan)
        self._state.apply(plan)
        self._history.apply(plan)
        self._attention.copy_blocks(plan.copies)
        self._ops.bind(NumpyStep(plan.token_ids, plan.positions))
        self._attention.bind(plan, self._state)
        x, residual = self._pass.run(self._ops, self._config, self._layers, self._receive(plan))
        x = x if residual is None else self._ops.add(x, residual)
        if not self._topology.is_last_stage:
            self._pp.send(x, self._pp.rank + 1, _HIDDEN_TAG)
            if self._topology.is_leader:
                self._expected.append(StepResult.num_words(plan, self._state, self._config.hidden_size))
            return
        result = self._finish(plan, x)
        if self._topology.is_leader:
            self._results.append(result)
        elif self._topology.tp_rank == 0:
            self._pp.send(result.pack(), 0, _RESULT_TAG)

    def collect(self) -> StepResult:
        """The oldest uncollected result; waits for the last stage."""
        if self._topology.is_last_stage:
            return self._results.popleft()
        buffer = np.empty(self._expected.popleft(), np.int32)
        return StepResult.unpack(self._pp.recv(buffer, self._pp.size - 1, _RESULT_TAG))

    def close(self) -> None:
        """Release the groups. *Collective over the replica.*"""
        self._tp.close()
        self._pp.close()

    def _receive(self, plan: StepPlan) -> Float32Array | None:
        """Hidden states of the previous stage, its residual added in; None on the first."""
        if self._topology.is_first_stage:
            return None
        hidden = np.empty((plan.num_tokens, self._config.hidden_size), np.float32)
        return self._pp.recv(hidden, self._pp.rank - 1, _HIDDEN_TAG)

    def _finish(self, plan: StepPlan, x: Float32Array) -> StepResult:
        """What the plan's rows ask for, on the last stage; equal on all its ranks."""
        result = self._tokens(plan, x)
        hidden_rows = plan.rows[plan.num_logit_rows :]
        if len(hidden_rows):
            result.hidden = self._hidden(x[hidden_rows])
        return result

    def _tokens(self, plan: StepPlan, x: Float32Array) -> StepResult:
        """Tokens of the rows that sample, and log-probabilities if any are wanted."""
        sampling, rows = self._state.sampling_of(plan), plan.rows[: plan.num_sampled]
        num_scored, count = self._state.logprob_shape(plan)
        needs_rows = (
            num_scored or (sampling["temperature"] > 0).any() or adjusts_logits(sampling).any() or len(plan.masks)
        )
        if self._tp.size > 1 and not needs_rows:
            return StepResult(plan.step_id, self._greedy(x[rows]))
        logits = self._logits(x[rows])
        positions = plan.sampled_positions
        adjusted = adjust_logits(
            logits, sampling, positions, self._state.biases, self._history.tokens, plan.row_masks
        )  # fmt: skip
        tokens = sample(adjusted, sampling, positions)
        if not num_scored:
            return StepResult(plan.step_id, tokens)
        parts = [_score(logits, np.maximum(tokens, 0), count)]
        for start in range(plan.num_sampled, num_scored, LOGIT_ROWS):
            chunk = slice(start, min(start + LOGIT_ROWS, num_scored))
            local = self._local_logits(x[plan.rows[chunk]])
            if self.logits_reader is not None:
                held = local[:, : self._vocabulary.stop - self._vocabulary.start]
                show_scored(self.logits_reader, plan, self._state, chunk, self._vocabulary.start, held)
            parts.append(_score(self._gathered(local), plan.targets[chunk], count))
        logprobs, ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        tokens = np.concatenate((tokens, plan.targets[plan.num_sampled : num_scored]))
        return StepResult(plan.step_id, tokens, logprobs, ids, values)

    def _hidden(self, x: Float32Array) -> Float32Array:
        """``[H, D] -> [H, D]`` through the head, short of the output projection."""
        self._ops.stop_before_logits = True
        try:
            hidden: Float32Array = self._pass.head(self._ops, self._config, x, None)
        finally:
            self._ops.stop_before_logits = False
        return hidden

    def _greedy(self, x: Float32Array) -> Int32Array:
        """Most probable tokens without gathering logits: ``[Q, D] -> [Q]``; -1 where a row is not finite."""
        if not len(x):
            return np.empty(0, np.int32)
        local: Float32Array = self._pass.head(self._ops, self._config, x, None)
        held = local[:, : self._vocabulary.stop - self._vocabulary.start]
        best = np.full((3, len(x)), -np.inf)
        best[2] = np.isfinite(held).all(axis=1)
        if held.shape[1]:
            ids = held.argmax(axis=1)
            best[0], best[1] = held[np.arange(len(x)), ids], ids + self._vocabulary.start
        values, tokens, finite = self._tp.all_gather(best).swapaxes(0, 1)
        winners = np.where(finite > 0, values, -np.inf).argmax(axis=0)
        chosen = np.where(finite.all(axis=0), tokens[winners, np.arange(len(x))], -1)
        return chosen.astype(np.int32)

    def _logits(self, x: Float32Array) -> Float32Array:
        """Logits over the whole vocabulary: ``[B, D] -> [B, V]``."""
        if not len(x):
            return np.empty((0, self._config.vocab_size), np.float32)
        return self._gathered(self._local_logits(x))

    def _local_logits(self, x: Float32Array) -> Float32Array:
        """``[B, V local]``, padding included."""
        local: Float32Array = self._pass.head(self._ops, self._config, x, None)
        return local

    def _gathered(self, local: Float32Array) -> Float32Array:
        if self._tp.size > 1:
            local = self._tp.all_gather(local).swapaxes(0, 1).reshape(len(local), -1)
        return local[:, : self._config.vocab_size]


def _score(logits: Float32Array, targets: Int32Array, count: int) -> tuple[Float32Array, Int32Array, Float32Array]:
    """Log-probability of each row's target and its ``count`` best alternatives."""
    logprobs = log_softmax(logits)
    chosen = np.take_along_axis(logprobs, targets[:, None].astype(np.int64), axis=1)[:, 0]
    return chosen, *top_logprobs(logprobs, count)


def _processor_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
