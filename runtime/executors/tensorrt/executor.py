# SPDX-License-Identifier: Apache-2.0
"""The TensorRT executor: steps become passes through this rank's engine, which also finds the most probable tokens; where a
request samples or wants log-probabilities, the host chooses from the logits.

An `EngineSession` runs the engine: `phalanx.runtime.executors.tensorrt.session` on a GPU, an interpreter of the network in the
tests. Everything else of a step is here and the same for both.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.base import CacheSize, refuse_other_passes
from phalanx.runtime.executors.scored_logits import LogitsReader, show_scored
from phalanx.runtime.executors.tensorrt.engine_session import EngineSession, PassOutput, Wanted
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.passes import EnginePass, StepTranslator
from phalanx.runtime.sampling.adjust import adjust_logits
from phalanx.runtime.sampling.fields import adjusts_logits
from phalanx.runtime.sampling.reference import log_softmax, sample, top_logprobs
from phalanx.runtime.step import BatchState, StepPlan, StepResult, TokenHistory
from phalanx.runtime.step.times import DeviceTimes, StepTimes

__all__ = ["TrtExecutor"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

_RESULT_TAG = 2


class TrtExecutor:
    """Runs planned steps as passes of a TensorRT engine that holds a whole stage.

    Args:
        shape: sizes that the engine was built for.
        pipeline: this rank's pipeline group on the host, for results.
    """

    lookahead = 0
    device_times: DeviceTimes | None = None
    num_saturated = 0
    step_times: StepTimes | None = None

    def __init__(self, session: EngineSession, shape: NetworkShape, topology: Topology, pipeline: Communicator) -> None:
        self._session, self._shape, self._topology, self._pipeline = session, shape, topology, pipeline
        self.cache = CacheSize("slots", shape.max_num_seqs, shape.max_model_len)
        self._translator = StepTranslator(shape)
        self._state = BatchState.empty(shape.max_num_seqs, 1)
        self._history = TokenHistory(self._state, shape.max_num_seqs, shape.max_model_len)
        self._chooses = topology.is_last_stage and topology.tp_rank == 0
        self._results: deque[StepResult] = deque()
        self._expected: deque[int] = deque()
        self.logits_reader: LogitsReader | None = None

    @property
    def device(self) -> str:
        """What computes, in words."""
        return self._session.device

    @property
    def depth(self) -> int:
        """One step per pipeline stage."""
        return self._topology.layout.pp

    @property
    def num_microbatches(self) -> int:
        """One per pipeline stage."""
        return self._topology.layout.pp

    def execute(self, plan: StepPlan) -> None:
        """Compute this rank's stage of ``plan``. *Collective over the replica.*"""
        _refuse_what_is_missing(plan)
        self._state.apply(plan)
        self._history.apply(plan)
        builder = _ResultBuilder(plan, self._state, self._history) if self._chooses else None
        for engine_pass in self._translator.passes(plan):
            output = self._session.run(engine_pass, builder.wanted(engine_pass) if builder else "nothing")
            if builder and output:
                builder.take(engine_pass, output)
                self._show(plan, engine_pass, output)
        if builder is None:
            if self._topology.is_leader:
                self._expected.append(StepResult.num_words(plan, self._state, 0))
        elif self._topology.is_leader:
            self._results.append(builder.result)
        else:
            self._pipeline.send(builder.result.pack(), 0, _RESULT_TAG)

    def _show(self, plan: StepPlan, engine_pass: EnginePass, output: PassOutput) -> None:
        """Logits of rows that score, whole rows on this one rank, to who wants them."""
        if self.logits_reader is not None and output.logits is not None:
            num_sampled = int((engine_pass.rows < plan.num_sampled).sum())
            rows, logits = engine_pass.rows[num_sampled:], output.logits[num_sampled : len(engine_pass.rows)]
            show_scored(self.logits_reader, plan, self._state, rows, 0, logits)

    def collect(self) -> StepResult:
        """The oldest uncollected result; waits for the last stage."""
        if self._topology.is_last_stage:
            return self._results.popleft()
        buffer = np.empty(self._expected.popleft(), np.int32)
        return StepResult.unpack(self._pipeline.recv(buffer, self._pipeline.size - 1, _RESULT_TAG))

    def close(self) -> None:
        """Release the engine and the groups. *Collective over the replica.*"""
        self._session.close()
        self._pipeline.close()


class _ResultBuilder:
    """Tokens and log-probabilities of one step, filled in pass by pass."""

    def __init__(self, plan: StepPlan, state: BatchState, history: TokenHistory) -> None:
        self._sampling, self._positions, self._biases = state.sampling_of(plan), plan.sampled_positions, state.biases
        self._history, self._masks = history, plan.row_masks
        rows, count = state.logprob_shape(plan)
        self.result = StepResult(
            plan.step_id, plan.targets.copy(), np.empty(rows, np.float32),
            np.empty((rows, count), np.int32), np.empty((rows, count), np.float32),
        )  # fmt: skip

    def wanted(self, engine_pass: EnginePass) -> Wanted:
        """What the pass's rows need."""
        if not len(engine_pass.rows):
            return "nothing"
        sampling = self._sampling[self._sampled(engine_pass)]
        needs_logits = (
            (sampling["temperature"] > 0).any() or adjusts_logits(sampling).any() or self._masks_of(engine_pass)
        )
        return "logits" if needs_logits or len(self.result.logprobs) else "tokens"

    def take(self, engine_pass: EnginePass, output: PassOutput) -> None:
        """Choose the tokens of one pass and score what is asked for."""
        rows, sampled, logits = engine_pass.rows, self._sampled(engine_pass), output.logits
        tokens = output.token_ids[: len(sampled)]
        if logits is not None:
            sampling, positions = self._sampling[sampled], self._positions[sampled]
            adjusted = adjust_logits(
                logits[: len(sampled)], sampling, positions, self._biases, self._history.tokens, self._masks_of(engine_pass)
            )  # fmt: skip
            tokens = sample(adjusted, sampling, positions)
        self.result.token_ids[sampled] = tokens
        if logits is not None and len(self.result.logprobs):
            self._score(rows, logits[: len(rows)])

    def _sampled(self, engine_pass: EnginePass) -> Int32Array:
        """Those of the pass's rows that sample, which come first."""
        return engine_pass.rows[engine_pass.rows < len(self._positions)]

    def _masks_of(self, engine_pass: EnginePass) -> dict[int, Int32Array]:
        """Masks by their place among the pass's rows that sample."""
        if not self._masks:
            return {}
        rows = enumerate(self._sampled(engine_pass).tolist())
        return {place: self._masks[row] for place, row in rows if row in self._masks}

    def _score(self, rows: Int32Array, logits: Float32Array) -> None:
        logprobs, targets = log_softmax(logits), np.maximum(self.result.token_ids[rows], 0)
        self.result.logprobs[rows] = np.take_along_axis(logprobs, targets[:, None].astype(np.int64), axis=1)[:, 0]
        ids, values = top_logprobs(logprobs, self.result.top_ids.shape[1])
        self.result.top_ids[rows], self.result.top_logprobs[rows] = ids, values


def _refuse_what_is_missing(plan: StepPlan) -> None:
    """Raise `ExecutorError` for what engines of linear caches do not have."""
    refuse_other_passes(plan)
    if plan.num_logit_rows < len(plan.rows):
        raise ExecutorError(f"step {plan.step_id} asks for hidden states, which the tensorrt engine does not return")
    if len(plan.copies):
        raise ExecutorError(f"step {plan.step_id} copies cache blocks, but the tensorrt engine's slots share none")
