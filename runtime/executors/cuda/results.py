"""Where a step's results lie on the device and in pinned memory: one buffer of int32 words, copied in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.runtime.request import MAX_LOGPROBS
from phalanx.runtime.step import StepResult

__all__ = ["ResultLayout", "ResultViews"]


@dataclass(frozen=True, slots=True)
class ResultViews:
    """Parts of a result buffer: tokens ``[B]``, log-probabilities ``[B]``, alternatives ``[B, k]`` twice."""

    token_ids: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any

    def rows(self, rows: range) -> ResultViews:
        """The same for some of the rows."""
        part = slice(rows.start, rows.stop)
        return ResultViews(self.token_ids[part], self.logprobs[part], self.top_ids[part], self.top_logprobs[part])


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """``num_rows`` tokens; unless ``num_top`` is -1, their log-probabilities and ``num_top`` alternatives of each."""

    num_rows: int
    num_top: int = -1

    @staticmethod
    def most_words(max_rows: int) -> int:
        """Words of the largest result of ``max_rows`` rows."""
        return ResultLayout(max_rows, MAX_LOGPROBS).num_words

    @property
    def num_words(self) -> int:
        """Length of the buffer."""
        return self.num_rows * (1 if self.num_top < 0 else 2 + 2 * self.num_top)

    def views(self, buffer: Any) -> ResultViews:
        """Cut a flat int32 array, NumPy's or CuPy's."""
        rows, top = self.num_rows, max(self.num_top, 0)
        ends = np.cumsum((rows, rows, rows * top, rows * top)).tolist()
        if self.num_top < 0:
            empty = buffer[:0]
            return ResultViews(buffer[:rows], empty.view(np.float32), empty.reshape(0, 0), empty.reshape(0, 0))
        return ResultViews(
            buffer[: ends[0]],
            buffer[ends[0] : ends[1]].view(np.float32),
            buffer[ends[1] : ends[2]].reshape(rows, top),
            buffer[ends[2] : ends[3]].view(np.float32).reshape(rows, top),
        )

    def result(self, step_id: int, num_rows: int, buffer: Any) -> StepResult:
        """Copies of the first ``num_rows`` rows from pinned memory; the others are padding."""
        views = self.views(buffer).rows(range(num_rows))
        tokens = views.token_ids.copy()
        if self.num_top < 0:
            return StepResult(step_id, tokens)
        return StepResult(step_id, tokens, views.logprobs.copy(), views.top_ids.copy(), views.top_logprobs.copy())
