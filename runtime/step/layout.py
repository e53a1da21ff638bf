# SPDX-License-Identifier: Apache-2.0
"""How a step plan lies in one buffer of int32 words: the table from which NumPy packs it and CUDA kernels read it.

The header holds the step's numbers, the sizes of the sections, and where each section begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.fields import DEVICE_COLUMNS

__all__ = [
    "ADMISSION",
    "PENDING_TOKEN",
    "STEP_LAYOUT",
    "TOKEN_BIAS",
    "TOKEN_BIAS_ENTRY",
    "Int32Array",
    "RowKind",
    "Section",
    "StepLayout",
]

Int32Array = NDArray[np.int32]

PENDING_TOKEN = -1
"""In `StepPlan.token_ids`: the token that this sequence sampled last, which the leader has not seen yet."""

ADMISSION = np.dtype(list(DEVICE_COLUMNS))
"""Sampling parameters of a sequence. temperature 0 = greedy; top_k 0 = all; penalties 0 = none; num_logprobs -1 = none, 0 =
the chosen token only; num_biases entries of the sequence's list of token biases count."""

TOKEN_BIAS = np.dtype([("token", "<i4"), ("bias", "<f4"), ("until", "<i4"), ("num_before", "<i4")])
"""A number added to one token's logit while the position to be sampled is below ``until`` and the output ends in the tokens of the
``num_before`` entries after it, the last token first. See `sampling.biases`."""

TOKEN_BIAS_ENTRY = np.dtype([("seq_index", "<i4"), ("index", "<i4"), ("bias", TOKEN_BIAS)])
"""A `TOKEN_BIAS` and where it goes: which sequence, and which place in its list."""


class RowKind(IntEnum):
    """What a plan wants of one of its rows."""

    SAMPLE = 0
    """The token that follows the row, by its sequence's sampling parameters."""
    SCORE = 1
    """The log-probability of the row's target as the token that follows."""
    HIDDEN = 2
    """The hidden state that the output projection would take."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the buffer: ``header[count]`` entries of ``words`` int32 words each."""

    name: str
    count: str
    words: int = 1


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The header's numbers, then the sections in order.

    Attributes:
        numbers: header words that are neither sizes nor offsets.
        header: names of all header words: ``numbers``, the sections' sizes, and ``<section>_at`` where each begins.
    """

    numbers: tuple[str, ...]
    sections: tuple[Section, ...]
    header: tuple[str, ...] = field(init=False)
    _places: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = tuple(dict.fromkeys(section.count for section in self.sections))
        header = (*self.numbers, *counts, *(f"{section.name}_at" for section in self.sections))
        object.__setattr__(self, "header", header)
        places = ((header.index(f"{s.name}_at"), header.index(s.count), s.words) for s in self.sections)
        object.__setattr__(self, "_places", tuple(places))

    def pack(self, numbers: Sequence[int], tables: Sequence[NDArray[Any]]) -> Int32Array:
        """Write one buffer from the header's ``numbers`` and one table a section: int32, or a structured dtype of whole words."""
        end = len(self.header)
        header = [*numbers, *([-1] * (end - len(self.numbers)))]
        parts: list[NDArray[Any]] = []
        for (at, count, words), table in zip(self._places, tables, strict=True):
            size = len(table)
            assert header[count] in (-1, size), "sections with one size have equally many entries"
            header[at], header[count] = end, size
            if size:
                parts.append(table if words == 1 else table.reshape(-1).view(np.int32))
                end += words * size
        return np.concatenate((np.array(header, np.int32), *parts))

    def unpack(self, words: Int32Array) -> tuple[list[int], list[Int32Array]]:
        """The header, and one flat view a section."""
        header: list[int] = words[: len(self.header)].tolist()
        return header, [words[header[at] : header[at] + header[count] * size] for at, count, size in self._places]

    def most_words(self, **most: int) -> int:
        """Words of the largest buffer with at most so many entries by size, for example ``num_seqs=8``."""
        return len(self.header) + sum(section.words * most[section.count] for section in self.sections)

    @property
    def defines(self) -> dict[str, int]:
        """Constants for CUDA kernels: ``AT_<header word>``, ``<section>_WORDS`` where an entry has several, kinds, and
        ``ADMISSION_PREFIX``, the word of an admission that holds ``num_prefix``."""
        places = {f"AT_{name.upper()}": index for index, name in enumerate(self.header)}
        sizes = {f"{section.name.upper()}_WORDS": section.words for section in self.sections if section.words > 1}
        assert ADMISSION.fields is not None
        prefix = ADMISSION.fields["num_prefix"][1] // 4
        own = {"SAMPLE": int(RowKind.SAMPLE), "PENDING_TOKEN": PENDING_TOKEN, "ADMISSION_PREFIX": prefix}
        return places | sizes | own


STEP_LAYOUT = StepLayout(
    ("step_id", "pass_id", "num_decodes", "num_alternatives"),
    (
        Section("seq_indices", "num_seqs"),
        Section("starts", "num_seqs"),
        Section("num_scheduled_tokens", "num_seqs"),
        Section("token_ids", "num_tokens"),
        Section("rows", "num_rows"),
        Section("kinds", "num_rows"),
        Section("targets", "num_rows"),
        Section("new_blocks", "num_new_blocks", 4),
        Section("copies", "num_copies", 3),
        Section("admissions", "num_admissions", ADMISSION.itemsize // 4),
        Section("biases", "num_biases", TOKEN_BIAS_ENTRY.itemsize // 4),
        Section("masked_rows", "num_masks"),
        Section("masks", "num_mask_words"),
    ),
)
"""The layout of `StepPlan`, whose attributes say what the sections hold."""
