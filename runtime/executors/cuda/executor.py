# SPDX-License-Identifier: Apache-2.0
"""The CUDA executor: one GPU a rank, the token loop on the device, whole steps in CUDA graphs.

A step is: the packed plan into pinned memory and, asynchronously, onto the device; kernels that derive lengths,
positions and cache slots from it and from what each sequence sampled last; the model; the sampler; an asynchronous copy of
the tokens back. The host waits for the device only in `CudaExecutor.collect`, one step late, and where it would write
to pinned memory that a step in flight still reads; so planning overlaps with computing.

Pipeline stages hand hidden states over by NCCL on the stream that computes. Only the leader's host needs the tokens, so
the last stage sends its results to the leader's device, which takes them on a stream of their own: the compute stream
never waits for a later stage. With several stages one micro-batch more than stages may be in flight, which hides the
host; the leader decides by the times that `CudaExecutor.warm_up` measures.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.dtypes import to_float32
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.parallel.nccl_comm import DeviceCommunicator
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.base import CacheSize, refuse_other_passes
from phalanx.runtime.executors.cuda.attention import CudaAttention
from phalanx.runtime.executors.cuda.graphs import (
    DECODE_ROWS,
    PREFILL_LOGIT_ROWS,
    PREFILL_ROWS,
    GraphCache,
    StepKey,
)
from phalanx.runtime.executors.cuda.memory import DeviceArray, download, pinned_array, upload
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.executors.cuda.ring import StepBuffers, StepRing
from phalanx.runtime.executors.cuda.stage import CudaStage
from phalanx.runtime.executors.cuda.step_times import measure_step_times
from phalanx.runtime.executors.cuda.trace import Category, Timeline, write_chrome_trace
from phalanx.runtime.executors.scored_logits import LogitsReader, show_scored
from phalanx.runtime.sampling.fields import adjusts_logits, restricts_tokens
from phalanx.runtime.step import BatchState, StepLimits, StepPlan, StepResult
from phalanx.runtime.step.times import DeviceTimes, StepTimes

__all__ = ["CudaExecutor"]


@dataclass(slots=True)
class CudaGroups:
    """This rank's communicators: tensor-parallel peers; pipeline stages, hidden states and results apart."""

    tensor: DeviceCommunicator
    stages: DeviceCommunicator
    results: DeviceCommunicator

    @property
    def all(self) -> tuple[DeviceCommunicator, ...]:
        """In the order in which they were made."""
        return self.tensor, self.stages, self.results


class CudaExecutor:
    """Runs planned steps on one GPU, as CUDA graphs unless rows do more than sample one token of each sequence. Not thread-safe.

    Args:
        stream: where steps run.
        num_kv_blocks: N, equal on all ranks.
        timeline: record one; steps then run without graphs.
        library_name: of what computes the model, for reports; empty = our own kernels and cuBLASLt.

    Attributes:
        step_times: of a pipeline, after `warm_up`.
    """

    def __init__(
        self, stage: CudaStage, attention: CudaAttention, limits: StepLimits, groups: CudaGroups, stream: Any,
        num_kv_blocks: int, timeline: Timeline | None = None, library_name: str = "",
    ) -> None:  # fmt: skip
        import cupy

        self._stage, self._attention, self._limits, self._groups = stage, attention, limits, groups
        self._device, self._stream = cupy.cuda.Device(), stream
        self._result_stream = cupy.cuda.Stream(non_blocking=True)
        self._state = BatchState.empty(limits.max_num_seqs, limits.blocks_per_seq)
        self._graphs: GraphCache[DeviceArray | None] = GraphCache(stream, enabled=timeline is None)
        result_words = ResultLayout.most_words(limits.max_logit_rows) if self.topology.is_leader else 0
        self._ring = StepRing(self.depth + 1, stage.arrays.plan.size, result_words, groups.all, self._graphs.clear)
        self._inbox = stage.results if self.topology.is_last_stage else cupy.empty(max(result_words, 1), np.int32)
        self._in_flight: deque[StepBuffers] = deque()
        self._timeline, self._library_name = timeline, library_name
        self.cache = CacheSize("paged", num_kv_blocks, limits.block_size)
        self.step_times: StepTimes | None = None
        self.logits_reader: LogitsReader | None = None

    @property
    def topology(self) -> Topology:
        """This rank's place."""
        return self._stage.topology

    @property
    def depth(self) -> int:
        """One step per pipeline stage and one that the host prepares meanwhile."""
        return self.topology.layout.pp + 1

    @property
    def lookahead(self) -> int:
        """1 without pipeline stages: the device knows a sequence's last token before the host does."""
        return 1 if self.topology.layout.pp == 1 else 0

    @property
    def num_microbatches(self) -> int:
        """One per pipeline stage, and in a pipeline one more, which hides the host."""
        return self.depth - self.lookahead

    @property
    def device(self) -> str:
        """This rank's GPU, and the library that computes if it is not our own."""
        import cupy

        name: bytes = cupy.cuda.runtime.getDeviceProperties(self._device.id)["name"]
        return f"{self._library_name} on {name.decode()}" if self._library_name else name.decode()

    @property
    def products(self) -> str:
        """How this rank multiplies fp8 blocks, after `warm_up`; "" without such weights."""
        return self._stage.ops.products_in_words(self._limits.max_num_tokens, self._stage.hidden.dtype.name)

    @property
    def num_saturated(self) -> int:
        return self._ring.num_saturated

    @property
    def device_times(self) -> DeviceTimes:
        """Of this rank's GPU, a few steps late; idle only on the leader, which alone collects."""
        return self._ring.times

    def execute(self, plan: StepPlan) -> None:
        """Start a step.

        *Collective over the replica.* Enqueues; waits only for a step ``depth`` + 1 before this one.
        """
        refuse_other_passes(plan)
        if self._timeline is not None:
            self._timeline.next_step()
        with self._device, self._stream, self._host_span("execute"):
            buffers = self._ring.acquire()
            buffers.follows = bool(self._in_flight)
            self._state.apply(plan)
            self._upload(plan, buffers)
            key = self._key(plan)
            layout = self._result_layout(plan, key)
            buffers.describe(plan, layout)
            self._compute(plan, key, layout)
            self._return_results(buffers, layout)
            if self._attention.saturated is not None:
                download(buffers.saturated, self._attention.saturated, self._stream)
            buffers.end.record(self._stream)
        if self.topology.is_leader:
            self._in_flight.append(buffers)

    def collect(self) -> StepResult:
        """The oldest uncollected result; waits for its step."""
        buffers = self._in_flight.popleft()
        with self._device, self._host_span("collect"):
            self._ring.wait(buffers.result)
        return buffers.read()

    def write_trace(self, path: Path, comm: Communicator) -> None:
        """Write the timeline of the last steps of all ranks; ``comm`` joins them. *Collective.*

        Raises:
            ConfigError: the engine was not told to record one.
        """
        if self._timeline is None:
            raise ConfigError("no timeline was recorded; set EngineConfig.trace")
        with self._device, self._stream:
            write_chrome_trace(path, self._timeline, comm)

    def warm_up(self, comm: Communicator) -> None:
        """Run and capture steps without sequences, so that serving neither compiles nor tunes much; time a pipeline's.

        Decoding steps of every size are captured without filters and with them.

        *Collective over ``comm``, the replica.*
        """
        limits = self._limits
        most = min(limits.max_num_seqs, limits.max_num_tokens)
        prefill_sizes = PREFILL_ROWS.sizes(limits.max_num_tokens)
        few = min(PREFILL_LOGIT_ROWS.smallest, most)
        pairs = [(size, most) for size in prefill_sizes if size > most] + [(size, few) for size in prefill_sizes]
        keys = [StepKey(size, size, False) for size in DECODE_ROWS.sizes(most)]
        keys += [StepKey(size, num_logit_rows, True) for size, num_logit_rows in dict.fromkeys(pairs)]
        with self._device, self._stream:
            for key in sorted(keys, key=lambda key: key.num_rows, reverse=True):
                self._run(key, at_once=True)
                if not key.has_prefill:
                    self._run(replace(key, filters=True), at_once=True)
            self._stream.synchronize()
        if self.topology.layout.pp > 1:
            self.step_times = measure_step_times(self, most, comm)
            self._ring.forget()

    def replay_seconds(self, num_seqs: int) -> float:
        """Device time of this rank's stage for the decoding step of ``num_seqs`` sequences that was executed last.

        *Collective over the stage.* Runs it twice more, without taking hidden states or handing them on.
        """
        import cupy

        key = self._of_stage(StepKey(num_seqs, num_seqs, False))
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        with self._device, self._stream:
            start.record(self._stream)
            for _ in range(2):
                self._graphs.run(key, self._stage.run)
            end.record(self._stream)
            self._ring.wait(end)
        seconds: float = cupy.cuda.get_elapsed_time(start, end) / 2e3
        return seconds

    def close(self) -> None:
        """Wait for what is in flight and release memory and groups. *Collective over the replica.*"""
        with self._device, self._stream:
            self._ring.drain()
            self._stream.synchronize()
            self._result_stream.synchronize()
            self._graphs.clear()
            self._attention.release()
            for group in self._groups.all:
                group.close()

    def _upload(self, plan: StepPlan, buffers: StepBuffers) -> None:
        words = plan.words
        if len(words) > len(buffers.plan_words) or len(plan.rows) > self._limits.max_logit_rows:
            raise ExecutorError(
                f"a plan of {len(words)} words and {len(plan.rows)} rows is beyond the {len(buffers.plan_words)} and "
                f"{self._limits.max_logit_rows} that fit {self._limits}"
            )
        buffers.plan_words[: len(words)] = words
        buffers.start.record(self._stream)
        upload(self._stage.arrays.plan, buffers.plan_words[: len(words)], self._stream)
        if len(plan.copies):
            self._attention.copy_blocks(self._stage.step, len(plan.copies))
            self._stage.step.copy_blocks(self._stage.arrays.cached_tokens, len(plan.copies))

    def _key(self, plan: StepPlan) -> StepKey:
        limits, num_logit_rows = self._limits, plan.num_logit_rows
        sampling = self._state.sampling_of(plan)
        num_scored, num_top = self._state.logprob_shape(plan)
        has_prefill = plan.num_decodes < plan.num_seqs
        most = min(limits.max_num_seqs, limits.max_num_tokens)
        if has_prefill:
            logit_rows, num_rows = PREFILL_LOGIT_ROWS, PREFILL_ROWS.size(plan.num_tokens, limits.max_num_tokens)
        else:
            logit_rows, num_rows = DECODE_ROWS, DECODE_ROWS.size(plan.num_tokens, most)
        if num_logit_rows and not self._runs_in_parts(plan):
            num_logit_rows = logit_rows.size(num_logit_rows, min(most, num_rows))
        return StepKey(
            num_rows=num_rows,
            num_logit_rows=num_logit_rows,
            has_prefill=has_prefill,
            filters=bool(restricts_tokens(sampling).any()),
            adjusts=bool(adjusts_logits(sampling).any()) or len(plan.masks) > 0,
            num_top=num_top if num_scored else -1,
        )

    def _runs_in_parts(self, plan: StepPlan) -> bool:
        """Whether rows do more than sample one token of each sequence: too many of them, or too varied, for graphs."""
        return len(plan.rows) > min(plan.num_sampled, self._limits.max_num_seqs)

    def _result_layout(self, plan: StepPlan, key: StepKey) -> ResultLayout:
        num_hidden, stage = len(plan.rows) - plan.num_logit_rows, self._stage
        if not num_hidden:
            return ResultLayout(key.num_logit_rows, key.num_top)
        layout = ResultLayout(key.num_logit_rows, key.num_top, num_hidden, stage.config.hidden_size, stage.hidden.dtype)
        if layout.num_words > ResultLayout.most_words(self._limits.max_logit_rows):
            raise ExecutorError(
                f"step {plan.step_id} asks for {num_hidden} hidden states of {stage.config.hidden_size} elements, which are more "
                "than its result has room for; ask for fewer at once"
            )
        return layout

    def _compute(self, plan: StepPlan, key: StepKey, layout: ResultLayout) -> None:
        if not self._runs_in_parts(plan):
            self._run(key)
            return
        self._receive_hidden(key)
        on_scored = None if self.logits_reader is None else partial(self._show, self.logits_reader, plan)
        self._send_hidden(self._stage.run_in_parts(key, plan.num_sampled, layout, on_scored))

    def _show(self, reader: LogitsReader, plan: StepPlan, rows: range, logits: DeviceArray) -> None:
        """Logits ``[B, V local]`` of rows that score to ``reader``; waits for the device."""
        stored = pinned_array(logits.shape, logits.dtype)
        download(stored, logits, self._stream)
        self._stream.synchronize()
        wide, span = to_float32(stored, np.empty(stored.shape, np.float32)), self._stage.sampler.vocabulary
        some = slice(rows.start, rows.stop)
        show_scored(reader, plan, self._state, some, span.start, wide[:, : span.stop - span.start])

    def _run(self, key: StepKey, *, at_once: bool = False) -> None:
        self._receive_hidden(key)
        self._send_hidden(self._graphs.run(self._of_stage(key), self._stage.run, at_once=at_once))

    def _of_stage(self, key: StepKey) -> StepKey:
        """Stages without logits run steps that differ in nothing else as one graph."""
        return key if self.topology.is_last_stage else StepKey(key.num_rows, 0, key.has_prefill)

    def _receive_hidden(self, key: StepKey) -> None:
        if not self.topology.is_first_stage:
            with self._device_span("receive", "bubble"):
                self._groups.stages.recv(self._stage.hidden[: key.num_rows], self.topology.stage - 1)

    def _send_hidden(self, hidden: DeviceArray | None) -> None:
        if hidden is not None:
            with self._device_span("send", "communication"):
                self._groups.stages.send(hidden, self.topology.stage + 1)

    def _return_results(self, buffers: StepBuffers, layout: ResultLayout) -> None:
        """Start the results' way to the leader's host, over the leader's device where it is not of the last stage."""
        topology, words, stream = self.topology, layout.num_words, self._stream
        if words and topology.is_last_stage and not topology.is_first_stage and topology.tp_rank == 0:
            self._groups.results.send(self._stage.results[:words], 0)
        if not topology.is_leader:
            return
        if words and not topology.is_last_stage:
            stream = self._result_stream
            with stream:
                self._groups.results.recv(self._inbox[:words], topology.layout.pp - 1)
        if words:
            download(buffers.result_words, self._inbox[:words], stream)
        buffers.result.record(stream)

    def _host_span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._timeline is None else self._timeline.host(name)

    def _device_span(self, name: str, category: Category) -> AbstractContextManager[None]:
        return nullcontext() if self._timeline is None else self._timeline.device(name, category)
