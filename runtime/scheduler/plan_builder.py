"""Turns a selection into a `StepPlan`, and remembers what its result will need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.runtime.scheduler.running_set import Selection
from phalanx.runtime.scheduler.sequences import Int32Array, Int64Array, SeqIndexArray, SequenceTable
from phalanx.runtime.step import ADMISSION, PENDING_TOKEN, StepPlan

__all__ = ["PlannedStep", "PromptRows", "build_plan"]


@dataclass(frozen=True, slots=True)
class PromptRows:
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
        prompt_rows: in order of the result's rows after the first Q.
    """

    step_id: int
    seq_indices: SeqIndexArray
    epochs: Int64Array
    prompt_rows: list[PromptRows]


def build_plan(
    step_id: int, table: SequenceTable, selection: Selection, new_blocks: Int32Array
) -> tuple[StepPlan, PlannedStep]:
    """Write down what to compute, and mark it as planned in ``table``."""
    seq_indices, num_scheduled_tokens, num_singles = _in_order(selection)
    starts = table.num_computed[seq_indices]
    samples = _sampling(table, seq_indices, starts + num_scheduled_tokens)
    plan = StepPlan(
        step_id,
        seq_indices.astype(np.int32),
        starts,
        num_scheduled_tokens,
        samples,
        _input_tokens(table, seq_indices, starts, num_scheduled_tokens, num_singles),
        new_blocks,
        np.array(selection.admissions, ADMISSION),
    )
    sampling_indices = seq_indices[samples > 0]
    planned = PlannedStep(step_id, sampling_indices, table.epochs[sampling_indices], _add_prompt_rows(table, plan))
    table.mark_planned(seq_indices, num_scheduled_tokens, sampling_indices)
    return plan, planned


def _in_order(selection: Selection) -> tuple[SeqIndexArray, Int32Array, int]:
    """Slots and num_scheduled_tokens, those with one token first, and how many those are."""
    if not selection.chunks:
        return selection.decodes, np.ones(len(selection.decodes), np.int32), len(selection.decodes)
    chunks = sorted(selection.chunks, key=lambda chunk: chunk[1] > 1)
    seq_indices = np.concatenate((selection.decodes, np.array([seq_index for seq_index, _ in chunks], np.intp)))
    num_scheduled_tokens = np.ones(len(seq_indices), np.int32)
    num_scheduled_tokens[len(selection.decodes) :] = [count for _, count in chunks]
    return seq_indices, num_scheduled_tokens, int(np.count_nonzero(num_scheduled_tokens == 1))


def _sampling(table: SequenceTable, seq_indices: SeqIndexArray, ends: Int32Array) -> Int32Array:
    lengths = table.num_known[seq_indices] + table.num_pending[seq_indices]
    samples: Int32Array = ((ends == lengths) & (lengths < table.target_length[seq_indices])).astype(np.int32)
    return samples


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


def _add_prompt_rows(table: SequenceTable, plan: StepPlan) -> list[PromptRows]:
    """Ask for the prompt log-probabilities that requests lack; a row scores the token after its own."""
    parts: list[PromptRows] = []
    rows: list[Int32Array] = []
    first_rows = plan.cu_seqlens
    for i in np.flatnonzero(plan.starts < table.num_prompt[plan.seq_indices]).tolist():
        seq_index, start = int(plan.seq_indices[i]), int(plan.starts[i])
        sequence = table.sequences[seq_index]
        if sequence is None or sequence.prompt_logprobs is None:
            continue
        end = min(start + int(plan.num_scheduled_tokens[i]), sequence.num_prompt - 1)
        begin = max(start, len(sequence.prompt_logprobs) - 1)  # a preempted sequence has the earlier ones already
        if begin < end:
            parts.append(PromptRows(seq_index, int(table.epochs[seq_index]), begin, end - begin))
            rows.append(np.arange(begin - start, end - start, dtype=np.int32) + first_rows[i])
            plan.num_prompt_logprobs = max(plan.num_prompt_logprobs, sequence.request.params.prompt_logprobs or 0)
    if parts:
        plan.prompt_rows = np.concatenate(rows)
        plan.prompt_targets = np.concatenate(
            [table.token_ids[part.seq_index, part.start + 1 : part.start + 1 + part.count] for part in parts]
        )
    return parts
