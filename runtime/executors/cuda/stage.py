# SPDX-License-Identifier: Apache-2.0
"""One pipeline stage of one step, as a sequence of kernel launches: what a captured graph holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phalanx.kernels.step_update import StepArrays, StepKernels
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.cuda.graphs import StepKey
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.cuda.ops import CudaOps
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.executors.cuda.sampler import CudaSampler
from phalanx.runtime.memory import LOGIT_ROWS
from phalanx.runtime.models.base import Pass

__all__ = ["CudaStage"]


@dataclass(frozen=True, slots=True)
class CudaStage:
    """Enqueues this rank's share of the step whose packed plan lies in ``step.arrays.plan``.

    Attributes:
        decode: the model's pass, or what stands for it.
        layers: global numbers of the blocks of this stage.
        hidden: ``[max tokens, D]`` what the previous stage handed over.
        results: int32 words, laid out by `ResultLayout`.
    """

    decode: Pass[Any]
    config: ModelConfig
    topology: Topology
    layers: range
    step: StepKernels
    ops: CudaOps
    sampler: CudaSampler
    hidden: DeviceArray
    results: DeviceArray

    @property
    def arrays(self) -> StepArrays:
        """What the step's kernels read and write."""
        return self.step.arrays

    def run(self, key: StepKey) -> DeviceArray | None:
        """The whole stage; returns what the next stage needs, ``[T, D]``, or None on the last.

        Enqueues; does not wait.
        """
        rows = max(key.num_logit_rows, 1)  # one padding row if no row needs logits
        narrows = self.topology.is_last_stage and rows < key.num_rows
        x, residual = self._blocks(key, rows, num_kept=rows if narrows else 0)
        if not self.topology.is_last_stage:
            return self._joined(x, residual)
        if key.num_logit_rows:
            self._sample(key, x, residual, range(key.num_logit_rows), ResultLayout(key.num_logit_rows, key.num_top))
        return None

    def run_in_parts(
        self, key: StepKey, num_sampled: int, layout: ResultLayout,
        on_scored: Callable[[range, DeviceArray], None] | None = None,
    ) -> DeviceArray | None:  # fmt: skip
        """Like `run` for any rows: ``num_sampled`` that sample, then those that score, then hidden states.

        ``on_scored`` is given rows that score and their logits ``[B, V local]``.
        """
        total = key.num_logit_rows
        x, residual = self._blocks(key, total + layout.num_hidden, num_kept=0)
        x = self._joined(x, residual)
        if not self.topology.is_last_stage:
            return x
        most = max(LOGIT_ROWS, len(self.arrays.seq_indices))
        starts = [*range(0, num_sampled, most), *range(num_sampled, total, LOGIT_ROWS), total]
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            logits = self._sample(key, x, None, range(start, stop), layout)
            if on_scored is not None and start >= num_sampled:
                on_scored(range(start, stop), logits)
        for start in range(0, layout.num_hidden, LOGIT_ROWS):
            self._store_hidden(x, range(start, min(start + LOGIT_ROWS, layout.num_hidden)), layout)
        return None

    def _joined(self, x: DeviceArray, residual: DeviceArray | None) -> DeviceArray:
        """What the last block leaves, as one array: its consumer may be on another rank."""
        return self.ops.values(x) if residual is None else self.ops.add(x, residual)

    def _store_hidden(self, x: DeviceArray, rows: range, layout: ResultLayout) -> None:
        """What the output projection would take; ``rows`` of those that ask for it."""
        first = layout.num_rows
        self.ops.bind_logits(range(first + rows.start, first + rows.stop), stop_before=True)
        hidden = self.decode.head(self.ops, self.config, x, None)
        layout.hidden_bytes(self.results)[rows.start : rows.stop] = hidden.view("uint8")

    def _blocks(self, key: StepKey, num_logit_rows: int, num_kept: int) -> tuple[DeviceArray, DeviceArray | None]:
        self.step.update(key.num_rows, num_logit_rows)
        self.ops.bind(key.num_rows, key.has_prefill, num_kept)
        received = None if self.topology.is_first_stage else self.hidden[: key.num_rows]
        return self.decode.run(self.ops, self.config, self.layers, received)

    def _sample(
        self, key: StepKey, x: DeviceArray, residual: DeviceArray | None, rows: range, layout: ResultLayout
    ) -> DeviceArray:
        """Choose and score tokens of ``rows``; their logits."""
        self.ops.bind_logits(rows)
        logits = self.decode.head(self.ops, self.config, x, residual)
        views = layout.views(self.results).rows(rows)
        self.sampler.choose(logits, rows, key.filters, key.adjusts, views.token_ids)
        self.step.store_tokens(views.token_ids, rows.start)
        if key.num_top >= 0:
            self.sampler.score(logits, views.token_ids, views.logprobs, views.top_ids, views.top_logprobs)
        return logits
