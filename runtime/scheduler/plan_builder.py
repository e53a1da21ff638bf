# SPDX-License-Identifier: Apache-2.0
"""Turns a selection into a `StepPlan`, and remembers what its result will need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.scheduler.running_set import Selection
from phalanx.runtime.scheduler.sequences import Int32Array, Int64Array, SeqIndexArray, SequenceTable
from phalanx.runtime.step import ADMISSION, PENDING_TOKEN, TOKEN_BIAS_ENTRY, RowKind, StepPlan

__all__ = ["CacheChanges", "PlannedStep", "ScoredSpan", "build_plan"]


_NO_MASKS = np.empty(0, np.int32), np.empty((0, 0), np.int32)


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Rows of a step that score prompt tokens of one sequence: those after ``start``, ``count`` of them."""

    seq_index: int
    epoch: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan in flight, as far as its result is concerned.

    Attributes:
        seq_indices: ``[Q]`` that sample a token.
        epochs: ``[Q]`` owners of those rows when it was planned.
        scored: in order of the result's rows after the first Q.
        num_rows: of the result.
    """

    step_id: int
    seq_indices: SeqIndexArray
    epochs: Int64Array
    scored: list[ScoredSpan]
    num_rows: int


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What a plan tells ranks about the cache: `StepPlan.new_blocks` and `StepPlan.copies`."""

    new_blocks: Int32Array
    copies: Int32Array


def build_plan(
    step_id: int, table: SequenceTable, selection: Selection, changes: CacheChanges
) -> tuple[StepPlan, PlannedStep]:
    """Write down what to compute, and mark it as planned in ``table``."""
    seq_indices, num_scheduled_tokens, num_singles = _in_order(selection)
    starts = table.num_computed[seq_indices]
    sampling = _sampling(table, seq_indices, starts + num_scheduled_tokens)
    first_rows = num_scheduled_tokens.cumsum(dtype=np.int32) - num_scheduled_tokens
    scored = _scored_spans(table, seq_indices, starts, num_scheduled_tokens)
    masked_rows, masks = _masks(table, seq_indices[sampling])
    plan = StepPlan.pack(
        step_id,
        seq_indices.astype(np.int32),
        starts,
        num_scheduled_tokens,
        _input_tokens(table, seq_indices, starts, num_scheduled_tokens, num_singles),
        *_rows(table, first_rows, num_scheduled_tokens, sampling, scored),
        new_blocks=changes.new_blocks,
        copies=changes.copies,
        admissions=np.array(selection.admissions, ADMISSION),
        biases=np.array(selection.biases, TOKEN_BIAS_ENTRY),
        masked_rows=masked_rows,
        masks=masks,
        num_alternatives=max((_num_alternatives(table, span) for _, span in scored), default=0),
    )
    sampling_indices = seq_indices[sampling]
    spans = [span for _, span in scored]
    planned = PlannedStep(step_id, sampling_indices, table.epochs[sampling_indices], spans, len(plan.rows))
    table.mark_planned(seq_indices, num_scheduled_tokens, sampling_indices)
    return plan, planned


def _masks(table: SequenceTable, sampling_indices: SeqIndexArray) -> tuple[Int32Array, Int32Array]:
    """Rows of sequences that have masks, and their masks."""
    if not table.masks:
        return _NO_MASKS
    rows = [row for row, seq_index in enumerate(sampling_indices.tolist()) if seq_index in table.masks]
    if not rows:
        return _NO_MASKS
    masks = np.stack([table.masks[int(sampling_indices[row])].words() for row in rows])
    return np.array(rows, np.int32), masks


def _in_order(selection: Selection) -> tuple[SeqIndexArray, Int32Array, int]:
    """Sequences and their tokens, those with one token first, and how many those are."""
    if not selection.chunks:
        return selection.decodes, np.ones(len(selection.decodes), np.int32), len(selection.decodes)
    chunks = sorted(selection.chunks, key=lambda chunk: chunk[1] > 1)
    seq_indices = np.concatenate((selection.decodes, np.array([seq_index for seq_index, _ in chunks], np.intp)))
    num_scheduled_tokens = np.ones(len(seq_indices), np.int32)
    num_scheduled_tokens[len(selection.decodes) :] = [count for _, count in chunks]
    return seq_indices, num_scheduled_tokens, int(np.count_nonzero(num_scheduled_tokens == 1))


def _sampling(table: SequenceTable, seq_indices: SeqIndexArray, ends: Int32Array) -> NDArray[np.bool_]:
    """``[S]`` whether all known tokens are then computed and another is wanted."""
    lengths = table.num_known[seq_indices] + table.num_pending[seq_indices]
    sampling: NDArray[np.bool_] = (ends == lengths) & (lengths < table.target_length[seq_indices])
    return sampling


def _input_tokens(
    table: SequenceTable,
    seq_indices: SeqIndexArray,
    starts: Int32Array,
    num_scheduled_tokens: Int32Array,
    num_singles: int,
) -> Int32Array:
    single_indices, positions = seq_indices[:num_singles], starts[:num_singles]
    first = table.tokens_at(single_indices, positions)
    first[positions >= table.num_known[single_indices]] = PENDING_TOKEN
    if num_singles == len(seq_indices):
        return first
    spans = zip(
        seq_indices[num_singles:].tolist(),
        starts[num_singles:].tolist(),
        num_scheduled_tokens[num_singles:].tolist(),
        strict=True,
    )
    return np.concatenate(
        [first, *(table.token_ids[seq_index, start : start + count] for seq_index, start, count in spans)]
    )


def _scored_spans(
    table: SequenceTable, seq_indices: SeqIndexArray, starts: Int32Array, num_scheduled_tokens: Int32Array
) -> list[tuple[int, ScoredSpan]]:
    """Prompt tokens whose log-probabilities requests still lack, each span with its place among the plan's sequences."""
    spans = []
    for i in np.flatnonzero(starts < table.num_prompt[seq_indices]).tolist():
        seq_index, start = int(seq_indices[i]), int(starts[i])
        sequence = table.sequences[seq_index]
        if sequence is None or sequence.prompt_logprobs is None:
            continue
        end = min(start + int(num_scheduled_tokens[i]), sequence.num_prompt - 1)
        begin = max(start, len(sequence.prompt_logprobs) - 1)  # a preempted sequence has the earlier ones already
        if begin < end:
            spans.append((i, ScoredSpan(seq_index, int(table.epochs[seq_index]), begin, end - begin)))
    return spans


def _rows(
    table: SequenceTable,
    first_rows: Int32Array,
    num_scheduled_tokens: Int32Array,
    sampling: NDArray[np.bool_],
    scored: list[tuple[int, ScoredSpan]],
) -> tuple[Int32Array, Int32Array | None, Int32Array | None]:
    """Rows, kinds and targets of the plan: the last row of each sequence that samples; a row scores the token after its own."""
    rows = (first_rows + num_scheduled_tokens)[sampling] - np.int32(1)
    if not scored:
        return rows, None, None
    parts, targets = [rows], [np.full(len(rows), -1, np.int32)]
    for i, span in scored:
        offset = int(first_rows[i]) + span.start - int(table.num_computed[span.seq_index])
        parts.append(np.arange(offset, offset + span.count, dtype=np.int32))
        targets.append(table.token_ids[span.seq_index, span.start + 1 : span.start + 1 + span.count])
    all_rows = np.concatenate(parts)
    kinds = np.full(len(all_rows), RowKind.SCORE, np.int32)
    kinds[: len(rows)] = RowKind.SAMPLE
    return all_rows, kinds, np.concatenate(targets)


def _num_alternatives(table: SequenceTable, span: ScoredSpan) -> int:
    sequence = table.sequences[span.seq_index]
    assert sequence is not None
    return sequence.request.params.prompt_logprobs or 0
