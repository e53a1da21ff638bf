# SPDX-License-Identifier: Apache-2.0
"""Where a step's results lie on the device and in pinned memory: one buffer of int32 words, copied in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.runtime.sampling.fields import MAX_ALTERNATIVES
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
    """``num_rows`` tokens; unless ``num_top`` is -1, their log-probabilities and ``num_top`` alternatives of each.

    Then ``num_hidden`` hidden states of ``hidden_size`` elements of ``hidden_dtype``.
    """

    num_rows: int
    num_top: int = -1
    num_hidden: int = 0
    hidden_size: int = 0
    hidden_dtype: np.dtype[Any] = np.dtype(np.float32)

    @staticmethod
    def most_words(max_rows: int) -> int:
        """Words of the largest result of ``max_rows`` rows."""
        return ResultLayout(max_rows, MAX_ALTERNATIVES).num_words

    @property
    def num_words(self) -> int:
        """Length of the buffer."""
        return self._row_words + self._hidden_words

    @property
    def _row_words(self) -> int:
        return self.num_rows * (1 if self.num_top < 0 else 2 + 2 * self.num_top)

    @property
    def _hidden_words(self) -> int:
        return -(-self.num_hidden * self.hidden_size * self.hidden_dtype.itemsize // 4)

    def hidden_bytes(self, buffer: Any) -> Any:
        """``[H, bytes]`` hidden states in a flat int32 array, NumPy's or CuPy's."""
        row_bytes = self.hidden_size * self.hidden_dtype.itemsize
        part = buffer[self._row_words : self.num_words].view(np.uint8)
        return part[: self.num_hidden * row_bytes].reshape(self.num_hidden, row_bytes)

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
        result = StepResult(step_id, views.token_ids.copy())
        if self.num_top >= 0:
            result.logprobs = views.logprobs.copy()
            result.top_ids, result.top_logprobs = views.top_ids.copy(), views.top_logprobs.copy()
        if self.num_hidden:
            result.hidden = self.hidden_bytes(buffer).view(self.hidden_dtype).astype(np.float32)
        return result
