"""One step, as all ranks see it: the plan that the leader broadcasts, the batch state it changes, the result.

A plan is a struct of int32 arrays packed into one buffer. All ranks hold the same `BatchState` and apply the same diffs
(new cache blocks, sampling parameters of admitted sequences), so a plan in steady decoding is a few integers per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.fields import DEVICE_COLUMNS

__all__ = ["ADMISSION", "PENDING_TOKEN", "BatchState", "StepPlan", "StepResult"]

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

PENDING_TOKEN = -1
"""In `StepPlan.token_ids`: the token that this sequence sampled last, which the leader has not seen yet."""

ADMISSION = np.dtype(list(DEVICE_COLUMNS))
"""Sampling parameters of a sequence. temperature 0 = greedy; top_k 0 = all; num_logprobs -1 = none, 0 = the chosen token only."""

_ADMISSION_WORDS = ADMISSION.itemsize // 4


def _empty(*shape: int) -> Int32Array:
    return np.empty(shape, np.int32)


@dataclass(slots=True)
class StepPlan:
    """What to compute in one step. Sequences with one token come first, then prompt chunks; rows follow that order.

    Attributes:
        step_id: consecutive number.
        seq_indices: ``[S]`` rows of the batch state, each at most once.
        starts: ``[S]`` position of the first token computed; everything before it is in the cache.
        num_scheduled_tokens: ``[S]`` tokens computed, at least 1.
        samples: ``[S]`` 1 where a token is sampled from the sequence's last row.
        token_ids: ``[T]`` input tokens, T = sum(num_scheduled_tokens); `PENDING_TOKEN` where only the executor knows it.
        new_blocks: ``[M, 3]`` (seq_index, index in its block table, block id), applied before the step.
        admissions: ``[A]`` of `ADMISSION`, applied before the step.
        prompt_rows: ``[G]`` rows whose log-probability of ``prompt_targets`` is wanted (prompt log-probabilities).
        prompt_targets: ``[G]`` token ids.
        num_prompt_logprobs: alternatives to report for those rows.
    """

    step_id: int
    seq_indices: Int32Array
    starts: Int32Array
    num_scheduled_tokens: Int32Array
    samples: Int32Array
    token_ids: Int32Array
    new_blocks: Int32Array = field(default_factory=lambda: _empty(0, 3))
    admissions: NDArray[np.void] = field(default_factory=lambda: np.empty(0, ADMISSION))
    prompt_rows: Int32Array = field(default_factory=lambda: _empty(0))
    prompt_targets: Int32Array = field(default_factory=lambda: _empty(0))
    num_prompt_logprobs: int = 0

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.seq_indices)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_decodes(self) -> int:
        """How many sequences, all at the front, compute exactly one token."""
        return int(np.searchsorted(self.num_scheduled_tokens > 1, True))

    @property
    def cu_seqlens(self) -> Int32Array:
        """``[S + 1]`` first row of each sequence, and T."""
        return np.concatenate(([0], np.cumsum(self.num_scheduled_tokens))).astype(np.int32)

    @property
    def positions(self) -> Int32Array:
        """``[T]`` position of each row in its sequence."""
        first_rows = np.repeat(self.cu_seqlens[:-1] - self.starts, self.num_scheduled_tokens)
        return np.arange(self.num_tokens, dtype=np.int32) - first_rows

    @property
    def sample_rows(self) -> Int32Array:
        """``[Q]`` rows that a token is sampled from, in order of sequences."""
        return self.cu_seqlens[1:][self.samples > 0] - 1

    @property
    def logit_rows(self) -> Int32Array:
        """``[B]`` rows that need logits: `sample_rows`, then `prompt_rows`."""
        return np.concatenate((self.sample_rows, self.prompt_rows))

    def logprob_shape(self, state: BatchState) -> tuple[int, int]:
        """Rows of the result that carry log-probabilities (Q + G, or 0 when nobody asked) and alternatives of each."""
        asked = state.sampling["num_logprobs"][self.seq_indices[self.samples > 0]]
        if not len(self.prompt_rows) and not (asked >= 0).any():
            return 0, 0
        most = int(asked.max(initial=0))
        rows = len(asked) + len(self.prompt_rows)
        return rows, max(most, self.num_prompt_logprobs if len(self.prompt_rows) else 0)

    def result_words(self, state: BatchState) -> int:
        """Length of the packed `StepResult` of this plan, in int32 words."""
        rows, count = self.logprob_shape(state)
        return StepResult.HEADER_WORDS + int((self.samples > 0).sum()) + rows * (1 + 2 * count)

    def pack(self) -> Int32Array:
        """One int32 buffer; `unpack` reverses it."""
        header = np.array(
            [self.step_id, self.num_seqs, self.num_tokens, len(self.new_blocks), len(self.admissions),
             len(self.prompt_rows), self.num_prompt_logprobs],
            np.int32,
        )  # fmt: skip
        return np.concatenate(
            (header, self.seq_indices, self.starts, self.num_scheduled_tokens, self.samples, self.token_ids, self.new_blocks.ravel(),
             self.admissions.view(np.int32), self.prompt_rows, self.prompt_targets)
        )  # fmt: skip

    @classmethod
    def unpack(cls, buffer: Int32Array) -> StepPlan:
        """Views of a packed buffer; the result aliases ``buffer``."""
        step_id, s, t, m, a, g, k = (int(value) for value in buffer[:7])
        sizes = (s, s, s, s, t, 3 * m, a * _ADMISSION_WORDS, g, g)
        ends = np.cumsum((7, *sizes))
        assert ends[-1] == len(buffer), (ends[-1], len(buffer))
        seq_indices, starts, num_scheduled_tokens, samples, token_ids, blocks, admissions, rows, targets = (
            buffer[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)
        )
        return cls(
            step_id, seq_indices, starts, num_scheduled_tokens, samples, token_ids, blocks.reshape(-1, 3), admissions.view(ADMISSION),
            rows, targets, k,
        )  # fmt: skip


@dataclass(slots=True)
class BatchState:
    """What a rank remembers of each running sequence between steps; equal on all ranks.

    Attributes:
        block_tables: ``[max_num_seqs, blocks per sequence]`` block ids.
        sampling: ``[max_num_seqs]`` of `ADMISSION`.
    """

    block_tables: Int32Array
    sampling: NDArray[np.void]

    @classmethod
    def empty(cls, max_num_seqs: int, max_blocks_per_seq: int) -> BatchState:
        """State with no sequence in it."""
        return cls(np.zeros((max_num_seqs, max_blocks_per_seq), np.int32), np.zeros(max_num_seqs, ADMISSION))

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's new blocks and admissions."""
        seq_index, index, block = plan.new_blocks.T
        self.block_tables[seq_index, index] = block
        self.sampling[plan.admissions["seq_index"]] = plan.admissions


@dataclass(slots=True)
class StepResult:
    """What a step produced, in the order of the plan's sampling sequences (Q), then prompt rows (G).

    Attributes:
        step_id: the plan's.
        token_ids: ``[Q]`` sampled tokens; -1 where the logits were not finite (that request ends with an error).
        logprobs: ``[Q + G]`` log-probability of the sampled token or prompt target; empty when nobody asked.
        top_ids, top_logprobs: ``[Q + G, k]`` alternatives, most probable first; k = the most that any row asked for.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))
    top_ids: Int32Array = field(default_factory=lambda: _empty(0, 0))
    top_logprobs: Float32Array = field(default_factory=lambda: np.empty((0, 0), np.float32))

    HEADER_WORDS: ClassVar[int] = 4

    def pack(self) -> Int32Array:
        """One int32 buffer; `unpack` reverses it."""
        header = np.array([self.step_id, len(self.token_ids), len(self.logprobs), self.top_ids.shape[1]], np.int32)
        return np.concatenate(
            (header, self.token_ids, self.logprobs.view(np.int32), self.top_ids.ravel(),
             self.top_logprobs.ravel().view(np.int32))
        )  # fmt: skip

    @classmethod
    def unpack(cls, buffer: Int32Array) -> StepResult:
        """Views of a packed buffer; the result aliases ``buffer``."""
        step_id, q, rows, k = (int(value) for value in buffer[: cls.HEADER_WORDS])
        ends = np.cumsum((cls.HEADER_WORDS, q, rows, rows * k, rows * k))
        token_ids, logprobs, top_ids, top_logprobs = (
            buffer[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)
        )
        return cls(
            step_id, token_ids, logprobs.view(np.float32), top_ids.reshape(rows, k),
            top_logprobs.view(np.float32).reshape(rows, k),
        )  # fmt: skip
