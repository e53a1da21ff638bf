# SPDX-License-Identifier: Apache-2.0
"""Reads a step's result into the sequence table and says what it means for each sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.request import Logprob
from phalanx.runtime.scheduler.plan_builder import PlannedStep
from phalanx.runtime.scheduler.sequences import Int32Array, SeqIndexArray, Sequence, SequenceTable
from phalanx.runtime.step import StepResult

__all__ = ["GOES_ON", "LENGTH", "NOT_FINITE", "STOP", "logprob_at", "outcomes", "store_prompt_logprobs"]

GOES_ON, STOP, LENGTH, NOT_FINITE = range(4)


def outcomes(
    table: SequenceTable, seq_indices: SeqIndexArray, token_ids: Int32Array, lengths: Int32Array
) -> NDArray[np.int8]:
    """``[S]`` what a sampled token means; an end token takes precedence over the length limit."""
    codes = np.where(lengths >= table.target_length[seq_indices], np.int8(LENGTH), np.int8(GOES_ON))
    ends = np.zeros(len(seq_indices), np.bool_)
    for end_ids in table.end_ids:
        ends |= end_ids[seq_indices] == token_ids
    if table.stop_sequences:
        for i in np.flatnonzero(np.isin(seq_indices, list(table.stop_sequences))):
            ends[i] |= table.ends_in_stop_sequence(int(seq_indices[i]))
    codes[ends & (lengths > table.min_length[seq_indices])] = STOP
    codes[token_ids < 0] = NOT_FINITE
    return codes


def store_prompt_logprobs(
    table: SequenceTable, planned: PlannedStep, result: StepResult
) -> list[tuple[Sequence, bool]]:
    """Keep the prompt log-probabilities of a result.

    Returns the sequences that got some and still own their row, each with whether all of them are numbers.
    """
    row = len(planned.seq_indices)  # rows that sample come first
    sequences = []
    for part in planned.scored:
        sequence = table.sequences[part.seq_index]
        if sequence is not None and table.epochs[part.seq_index] == part.epoch:
            assert sequence.prompt_logprobs is not None
            most = sequence.request.params.prompt_logprobs or 0
            targets = table.token_ids[part.seq_index, part.start + 1 : part.start + 1 + part.count].tolist()
            sequence.prompt_logprobs.extend(logprob_at(result, row + i, token, most) for i, token in enumerate(targets))
            sequences.append((sequence, not np.isnan(result.logprobs[row : row + part.count]).any()))
        row += part.count
    return sequences


def logprob_at(result: StepResult, row: int, token_id: int, num_alternatives: int) -> Logprob:
    """Log-probability of a token in a result's row, and as many alternatives as its request asked for."""
    top_ids = result.top_ids[row, :num_alternatives].tolist() if num_alternatives else []
    top_logprobs = result.top_logprobs[row, :num_alternatives].tolist() if num_alternatives else []
    return Logprob(token_id, float(result.logprobs[row]), tuple(zip(top_ids, top_logprobs, strict=True)))
