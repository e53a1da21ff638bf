# SPDX-License-Identifier: Apache-2.0
"""From a step plan to passes through an engine: one decode pass over slots, then one prefill pass per piece of a prompt chunk.

A decode pass computes the slots ``0..B-1``, because the caches' batch axis is memory order; a slot in between that has nothing
to decode computes a token that is never read, at the position that its next real token will overwrite.
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
        logit_rows: ``[R]`` rows of ``[B N]`` that get logits. Never empty: an engine cannot compute no rows, so a pass that
            needs none computes row 0.
        rows: which of the plan's rows the first of these are for; those that sample come first.
    """

    profile: int
    first_slot: int
    token_ids: Int32Array
    positions: Int32Array
    write_indices: Int32Array
    logit_rows: Int32Array
    rows: Int32Array

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
        num_decodes = self._plain_decodes(plan)
        if num_decodes:
            yield self._decode(plan, num_decodes)
        for sequence in range(num_decodes, plan.num_seqs):
            yield from self._prefill(plan, sequence)

    def _plain_decodes(self, plan: StepPlan) -> int:
        """Sequences of one token, from the front, none of which is scored."""
        scored = plan.rows[plan.num_sampled :]
        return min(plan.num_decodes, int(scored.min(initial=plan.num_decodes)))

    def _decode(self, plan: StepPlan, num_decodes: int) -> EnginePass:
        slots = plan.seq_indices[:num_decodes]
        num_slots = _round_up(int(slots.max()) + 1, self._shape.max_num_seqs)
        positions = np.minimum(self._filled[:num_slots], self._shape.max_model_len - 1)
        token_ids = np.zeros(num_slots, np.int32)
        positions[slots], token_ids[slots] = plan.starts[:num_decodes], plan.token_ids[:num_decodes]
        self._filled[slots] = plan.starts[:num_decodes] + 1
        rows = _within(plan.rows, 0, num_decodes)
        sampled = slots[plan.rows[rows]]
        # All slots get logits: a decode pass then has one shape for each number of slots, which a CUDA graph needs.
        logit_rows = np.concatenate((sampled, np.setdiff1d(np.arange(num_slots), sampled)))
        return EnginePass(
            DECODE_PROFILE, 0, token_ids[:, None], positions[:, None], positions, logit_rows.astype(np.int32), rows
        )  # fmt: skip

    def _prefill(self, plan: StepPlan, sequence: int) -> Iterator[EnginePass]:
        """One chunk, cut where it is longer than the profile or asks for more logits than fit."""
        columns = (plan.seq_indices, plan.starts, plan.num_scheduled_tokens)
        slot, start, count = (int(column[sequence]) for column in columns)
        first_row = int(plan.cu_seqlens[sequence])
        self._filled[slot] = start + count
        longest = self._shape.max_prefill_tokens
        sampled, scored = plan.rows[: plan.num_sampled], plan.rows[plan.num_sampled :]
        if len(_within(scored, first_row, first_row + count)):
            num_sampled = len(_within(sampled, first_row, first_row + count))  # any of which may be scored, too
            longest = max(1, min(longest, self._shape.max_prefill_logit_rows - num_sampled))
        for low in range(0, count, longest):
            high = min(low + longest, count)
            rows = _within(plan.rows, first_row + low, first_row + high)
            logit_rows = plan.rows[rows] - np.int32(first_row + low)
            yield EnginePass(
                PREFILL_PROFILE, slot, plan.token_ids[None, first_row + low : first_row + high],
                np.arange(start + low, start + high, dtype=np.int32)[None], np.array([start + low], np.int32),
                logit_rows if len(rows) else np.zeros(1, np.int32), rows,
            )  # fmt: skip


def _within(rows: Int32Array, low: int, high: int) -> Int32Array:
    """Indices of the rows in ``[low, high)``."""
    return np.flatnonzero((rows >= low) & (rows < high)).astype(np.int32)


def slot_buckets(limit: int) -> list[int]:
    """Numbers of slots that decode passes are rounded up to: powers of two, and ``limit``."""
    return [*(1 << exponent for exponent in range((limit - 1).bit_length())), limit]


def _round_up(count: int, limit: int) -> int:
    return next(bucket for bucket in slot_buckets(limit) if bucket >= count)
