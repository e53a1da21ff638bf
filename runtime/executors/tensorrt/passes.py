# SPDX-License-Identifier: Apache-2.0
"""From a step plan to passes through an engine: one decode pass over slots, then one prefill pass per piece of a prompt chunk.

A decode pass computes the slots ``0..B-1``, because the caches' batch axis is memory order; a slot in between that has nothing
to decode computes a token that nobody reads, at the position that its next real token will overwrite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.executors.tensorrt.network import DECODE_PROFILE, PREFILL_PROFILE, NetworkShape
from phalanx.runtime.step import StepPlan

__all__ = ["EnginePass", "StepTranslator", "slot_buckets"]

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EnginePass:
    """One execution of an engine.

    Attributes:
        profile: `DECODE_PROFILE` or `PREFILL_PROFILE`.
        first_slot: slot whose cache memory the batch axis starts at.
        token_ids, positions: ``[B, N]``.
        write_indices: ``[B]``.
        logit_rows: ``[R]`` rows of ``[B N]`` that get logits; those that are sampled from, then prompt rows. Never empty:
            an engine cannot compute no rows, so a pass that needs none computes row 0.
        samples: which of the plan's sampling sequences the first rows are for.
        prompts: which of the plan's prompt rows the next rows are for.
    """

    profile: int
    first_slot: int
    token_ids: Int32Array
    positions: Int32Array
    write_indices: Int32Array
    logit_rows: Int32Array
    samples: Int32Array
    prompts: Int32Array

    @property
    def num_tokens(self) -> int:
        """B N."""
        return int(self.token_ids.size)


class StepTranslator:
    """Keeps what the plans imply about each slot: how many positions of it are filled.

    Args:
        shape: sizes that the engine was built for.
    """

    def __init__(self, shape: NetworkShape) -> None:
        self._shape = shape
        self._filled = np.zeros(shape.max_num_seqs, np.int32)

    def passes(self, plan: StepPlan) -> Iterator[EnginePass]:
        """Passes of a step, in the order in which every rank must run them."""
        sample_index = np.where(plan.samples > 0, np.cumsum(plan.samples > 0) - 1, -1).astype(np.int32)
        num_decodes = self._plain_decodes(plan)
        if num_decodes:
            yield self._decode(plan, num_decodes, sample_index)
        for sequence in range(num_decodes, plan.num_seqs):
            yield from self._prefill(plan, sequence, int(sample_index[sequence]))

    def _plain_decodes(self, plan: StepPlan) -> int:
        """Sequences of one token, from the front, none of which is asked for prompt log-probabilities."""
        if not len(plan.prompt_rows):
            return plan.num_decodes
        return min(plan.num_decodes, int(plan.prompt_rows.min()))

    def _decode(self, plan: StepPlan, num_decodes: int, sample_index: Int32Array) -> EnginePass:
        slots = plan.seq_indices[:num_decodes]
        num_slots = _round_up(int(slots.max()) + 1, self._shape.max_num_seqs)
        positions = np.minimum(self._filled[:num_slots], self._shape.max_model_len - 1)
        token_ids = np.zeros(num_slots, np.int32)
        positions[slots], token_ids[slots] = plan.starts[:num_decodes], plan.token_ids[:num_decodes]
        self._filled[slots] = plan.starts[:num_decodes] + 1
        sampled = sample_index[:num_decodes] >= 0
        # All slots get logits: a decode pass then has one shape for each number of slots, which a CUDA graph needs.
        rows = np.concatenate((slots[sampled], np.setdiff1d(np.arange(num_slots), slots[sampled])))
        return EnginePass(
            DECODE_PROFILE, 0, token_ids[:, None], positions[:, None], positions, rows.astype(np.int32),
            sample_index[:num_decodes][sampled], np.empty(0, np.int32),
        )  # fmt: skip

    def _prefill(self, plan: StepPlan, sequence: int, sample_index: int) -> Iterator[EnginePass]:
        """One chunk, cut where it is longer than the profile or asks for more logits than fit."""
        slot, start, count = (
            int(column[sequence]) for column in (plan.seq_indices, plan.starts, plan.num_scheduled_tokens)
        )
        first_row = int(plan.cu_seqlens[sequence])
        self._filled[slot] = start + count
        longest = self._shape.max_prefill_tokens
        if len(_within(plan.prompt_rows, first_row, first_row + count)):
            # One row is kept for the token that is sampled.
            longest = max(1, min(longest, self._shape.max_prefill_logit_rows - 1))
        for low in range(0, count, longest):
            high = min(low + longest, count)
            prompts = _within(plan.prompt_rows, first_row + low, first_row + high)
            samples = np.array([sample_index] if high == count and sample_index >= 0 else [], np.int32)
            rows = np.concatenate((np.full(len(samples), high - low - 1), plan.prompt_rows[prompts] - first_row - low))
            yield EnginePass(
                PREFILL_PROFILE, slot, plan.token_ids[None, first_row + low : first_row + high],
                np.arange(start + low, start + high, dtype=np.int32)[None], np.array([start + low], np.int32),
                (rows if len(rows) else np.zeros(1)).astype(np.int32), samples, prompts,
            )  # fmt: skip


def _within(rows: Int32Array, low: int, high: int) -> Int32Array:
    """Indices of the rows in ``[low, high)``."""
    return np.flatnonzero((rows >= low) & (rows < high)).astype(np.int32)


def slot_buckets(limit: int) -> list[int]:
    """Numbers of slots that decode passes are rounded up to: powers of two, and ``limit``."""
    return [*(1 << exponent for exponent in range((limit - 1).bit_length())), limit]


def _round_up(count: int, limit: int) -> int:
    return next(bucket for bucket in slot_buckets(limit) if bucket >= count)
