"""Turns chosen slots and counts into a `StepPlan`, and remembers what its result will need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.runtime.scheduler.batcher import Selection
from phalanx.runtime.scheduler.sequences import Int32Array, Int64Array, SequenceTable, SlotArray
from phalanx.runtime.step import ADMISSION, PENDING_TOKEN, StepPlan

__all__ = ["PlannedStep", "PromptRows", "build_plan"]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step that score prompt tokens of one sequence: those after ``start``, ``count`` of them."""

    slot: int
    epoch: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan in flight, as far as its result is concerned.

    Attributes:
        slots: ``[Q]`` that sample a token.
        epochs: ``[Q]`` owners of those slots when it was planned.
        prompt_rows: in order of the result's rows after the first Q.
    """

    step_id: int
    slots: SlotArray
    epochs: Int64Array
    prompt_rows: list[PromptRows]


def build_plan(
    step_id: int, table: SequenceTable, selection: Selection, new_blocks: Int32Array
) -> tuple[StepPlan, PlannedStep]:
    """Write down what to compute, and mark it as planned in ``table``."""
    slots, counts, num_singles = _in_order(selection)
    starts = table.num_computed[slots]
    samples = _sampling(table, slots, starts + counts)
    plan = StepPlan(
        step_id,
        slots.astype(np.int32),
        starts,
        counts,
        samples,
        _input_tokens(table, slots, starts, counts, num_singles),
        new_blocks,
        np.array(selection.admissions, ADMISSION),
    )
    sampling_slots = slots[samples > 0]
    planned = PlannedStep(step_id, sampling_slots, table.epochs[sampling_slots], _add_prompt_rows(table, plan))
    table.mark_planned(slots, counts, sampling_slots)
    return plan, planned


def _in_order(selection: Selection) -> tuple[SlotArray, Int32Array, int]:
    """Slots and counts, those with one token first, and how many those are."""
    if not selection.chunks:
        return selection.decodes, np.ones(len(selection.decodes), np.int32), len(selection.decodes)
    chunks = sorted(selection.chunks, key=lambda chunk: chunk[1] > 1)
    slots = np.concatenate((selection.decodes, np.array([slot for slot, _ in chunks], np.intp)))
    counts = np.ones(len(slots), np.int32)
    counts[len(selection.decodes) :] = [count for _, count in chunks]
    return slots, counts, int(np.count_nonzero(counts == 1))


def _sampling(table: SequenceTable, slots: SlotArray, ends: Int32Array) -> Int32Array:
    lengths = table.num_known[slots] + table.num_pending[slots]
    samples: Int32Array = ((ends == lengths) & (lengths < table.target_length[slots])).astype(np.int32)
    return samples


def _input_tokens(
    table: SequenceTable, slots: SlotArray, starts: Int32Array, counts: Int32Array, num_singles: int
) -> Int32Array:
    single_slots, positions = slots[:num_singles], starts[:num_singles]
    first = table.tokens_at(single_slots, positions)
    first[positions >= table.num_known[single_slots]] = PENDING_TOKEN
    if num_singles == len(slots):
        return first
    spans = zip(
        slots[num_singles:].tolist(),
        starts[num_singles:].tolist(),
        counts[num_singles:].tolist(),
        strict=True,
    )
    return np.concatenate([first, *(table.token_ids[slot, start : start + count] for slot, start, count in spans)])


def _add_prompt_rows(table: SequenceTable, plan: StepPlan) -> list[PromptRows]:
    """Ask for the prompt log-probabilities that requests lack; a row scores the token after its own."""
    parts: list[PromptRows] = []
    rows: list[Int32Array] = []
    first_rows = plan.cu_seqlens
    for i in np.flatnonzero(plan.starts < table.num_prompt[plan.slots]).tolist():
        slot, start = int(plan.slots[i]), int(plan.starts[i])
        sequence = table.sequences[slot]
        if sequence is None or sequence.prompt_logprobs is None:
            continue
        end = min(start + int(plan.counts[i]), sequence.num_prompt - 1)
        begin = max(start, len(sequence.prompt_logprobs) - 1)  # a preempted sequence has the earlier ones already
        if begin < end:
            parts.append(PromptRows(slot, int(table.epochs[slot]), begin, end - begin))
            rows.append(np.arange(begin - start, end - start, dtype=np.int32) + first_rows[i])
            plan.num_prompt_logprobs = max(plan.num_prompt_logprobs, sequence.request.params.prompt_logprobs or 0)
    if parts:
        plan.prompt_rows = np.concatenate(rows)
        plan.prompt_targets = np.concatenate(
            [table.token_ids[part.slot, part.start + 1 : part.start + 1 + part.count] for part in parts]
        )
    return parts
