# SPDX-License-Identifier: Apache-2.0
"""What a step produced, by the rows that its plan named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.step.layout import Int32Array
from phalanx.runtime.step.plan import StepPlan
from phalanx.runtime.step.state import BatchState

__all__ = ["StepResult"]

Float32Array = NDArray[np.float32]


@dataclass(slots=True)
class StepResult:
    """Results in the order of the plan's rows: the L rows that sample or score, then the hidden states of the other H.

    Attributes:
        step_id: the plan's.
        token_ids: ``[L]`` sampled tokens, -1 where the logits were not finite (that request ends with an error); of rows
            that score, their targets.
        logprobs: ``[L]`` log-probabilities of those tokens; NaN where the logits were not finite; empty if no request
            asked.
        top_ids, top_logprobs: ``[L, k]`` alternatives, most probable first; k = the most that any row asked for.
        hidden: ``[H, D]`` what the output projection would have taken.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))
    top_ids: Int32Array = field(default_factory=lambda: np.empty((0, 0), np.int32))
    top_logprobs: Float32Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    hidden: Float32Array = field(default_factory=lambda: np.empty((0, 0), np.float32))

    HEADER_WORDS: ClassVar[int] = 6

    @classmethod
    def num_words(cls, plan: StepPlan, state: BatchState, hidden_size: int) -> int:
        """Length of the packed result of ``plan``."""
        rows, count = state.logprob_shape(plan)
        hidden = (len(plan.rows) - plan.num_logit_rows) * hidden_size
        return cls.HEADER_WORDS + plan.num_logit_rows + rows * (1 + 2 * count) + hidden

    def pack(self) -> Int32Array:
        """One int32 buffer; `unpack` reverses it."""
        sizes = (len(self.token_ids), len(self.logprobs), self.top_ids.shape[1], *self.hidden.shape)
        columns = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs, self.hidden)
        header = np.array((self.step_id, *sizes), np.int32)
        packed: Int32Array = np.concatenate((header, *(column.reshape(-1).view(np.int32) for column in columns)))
        return packed

    @classmethod
    def unpack(cls, buffer: Int32Array) -> StepResult:
        """Views of a packed buffer; the result aliases ``buffer``."""
        step_id, tokens, rows, k, num_hidden, size = buffer[: cls.HEADER_WORDS].tolist()
        ends = np.cumsum((cls.HEADER_WORDS, tokens, rows, rows * k, rows * k, num_hidden * size))
        token_ids, logprobs, top_ids, top_logprobs, hidden = (
            buffer[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)
        )
        return cls(
            step_id, token_ids, logprobs.view(np.float32), top_ids.reshape(rows, k),
            top_logprobs.view(np.float32).reshape(rows, k), hidden.view(np.float32).reshape(num_hidden, size),
        )  # fmt: skip
