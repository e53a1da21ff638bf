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
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.base import CacheSize, Capabilities
from phalanx.runtime.executors.tensorrt.engine_session import EngineSession, PassOutput, Wanted
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.passes import EnginePass, StepTranslator
from phalanx.runtime.sampling.reference import log_softmax, sample, top_logprobs
from phalanx.runtime.step import BatchState, StepPlan, StepResult
from phalanx.runtime.step.times import DeviceTimes, StepTimes

__all__ = ["CAPABILITIES", "TrtExecutor"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

CAPABILITIES = Capabilities("tensorrt", frozenset({"float32", "bfloat16", "float16"}), soft_cap=False, alibi=False)

_RESULT_TAG = 2


class TrtExecutor:
    """See `phalanx.runtime.executors.base.Executor`.

    Args:
        shape: sizes that the engine was built for.
        pipeline: this rank's pipeline group on the host, for results.
    """

    lookahead = 0
    device_times: DeviceTimes | None = None
    step_times: StepTimes | None = None

    def __init__(self, session: EngineSession, shape: NetworkShape, topology: Topology, pipeline: Communicator) -> None:
        self._session, self._shape, self._topology, self._pipeline = session, shape, topology, pipeline
        self.cache = CacheSize("slots", shape.max_num_seqs, shape.max_model_len)
        self._translator = StepTranslator(shape)
        self._state = BatchState.empty(shape.max_num_seqs, 1)
        self._chooses = topology.is_last_stage and topology.tp_rank == 0
        self._results: deque[StepResult] = deque()
        self._expected: deque[int] = deque()

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
        self._state.apply(plan)
        builder = _ResultBuilder(plan, self._state) if self._chooses else None
        for engine_pass in self._translator.passes(plan):
            output = self._session.run(engine_pass, builder.wanted(engine_pass) if builder else "nothing")
            if builder and output:
                builder.take(engine_pass, output)
        if builder is None:
            if self._topology.is_leader:
                self._expected.append(plan.result_words(self._state))
        elif self._topology.is_leader:
            self._results.append(builder.result)
        else:
            self._pipeline.send(builder.result.pack(), 0, _RESULT_TAG)

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

    def __init__(self, plan: StepPlan, state: BatchState) -> None:
        sampled = plan.samples > 0
        self._sampling = state.sampling[plan.seq_indices[sampled]]
        self._positions = (plan.starts + plan.num_scheduled_tokens)[sampled]
        self._targets = plan.prompt_targets
        rows, count = plan.logprob_shape(state)
        self.result = StepResult(
            plan.step_id, np.empty(len(self._positions), np.int32), np.empty(rows, np.float32),
            np.empty((rows, count), np.int32), np.empty((rows, count), np.float32),
        )  # fmt: skip

    def wanted(self, engine_pass: EnginePass) -> Wanted:
        """What the pass's rows need."""
        if not len(engine_pass.samples) and not len(engine_pass.prompts):
            return "nothing"
        is_greedy = (self._sampling["temperature"][engine_pass.samples] <= 0).all()
        return "tokens" if is_greedy and not len(self.result.logprobs) else "logits"

    def take(self, engine_pass: EnginePass, output: PassOutput) -> None:
        """Choose the tokens of one pass and score what is asked for."""
        samples, prompts = engine_pass.samples, engine_pass.prompts
        tokens, logits = output.token_ids[: len(samples)], output.logits
        if logits is not None:
            tokens = sample(logits[: len(samples)], self._sampling[samples], self._positions[samples])
        self.result.token_ids[samples] = tokens
        if logits is not None and len(self.result.logprobs):
            self._score(samples, logits[: len(samples)], np.maximum(tokens, 0))
            prompt_logits = logits[len(samples) : len(samples) + len(prompts)]
            self._score(len(self._positions) + prompts, prompt_logits, self._targets[prompts])

    def _score(self, rows: Int32Array, logits: Float32Array, targets: Int32Array) -> None:
        if not len(rows):
            return
        logprobs = log_softmax(logits)
        self.result.logprobs[rows] = np.take_along_axis(logprobs, targets[:, None].astype(np.int64), axis=1)[:, 0]
        ids, values = top_logprobs(logprobs, self.result.top_ids.shape[1])
        self.result.top_ids[rows], self.result.top_logprobs[rows] = ids, values
