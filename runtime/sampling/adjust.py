# SPDX-License-Identifier: Apache-2.0
"""What changes logits before a token is chosen: the reference that every executor's sampler must agree with.

In vLLM's order: token masks, token biases, then the repetition penalty, then frequency and presence penalties. Log-probabilities stay those of
the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.biases import add_biases
from phalanx.runtime.sampling.fields import adjusts_logits
from phalanx.runtime.sampling.masks import RowMasks, apply_mask

__all__ = ["History", "adjust_logits"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

History = Callable[[int, int], Int32Array]
"""A sequence's index and a length, to that many of its first tokens."""


_NO_MASKS: RowMasks = MappingProxyType({})


def adjust_logits(
    logits: Float32Array, sampling: NDArray[np.void], positions: Int32Array, biases: NDArray[np.void], history: History,
    masks: RowMasks = _NO_MASKS,
) -> Float32Array:  # fmt: skip
    """``logits [Q, V]`` as the choice sees them; the argument itself where no row changes any.

    Args:
        sampling: ``[Q]`` records of `phalanx.runtime.step.ADMISSION`.
        positions: ``[Q]`` position that the new token takes in its sequence.
        biases: ``[max_num_seqs, MAX_TOKEN_BIASES]`` of `phalanx.runtime.step.TOKEN_BIAS`.
        history: tokens before that position.
        masks: of some rows, which tokens they may choose.
    """
    rows = {*np.flatnonzero(adjusts_logits(sampling)).tolist(), *masks}
    if not rows:
        return logits
    adjusted = logits.copy()
    for row in rows:
        if row in masks:
            apply_mask(adjusted[row], masks[row])
        record, position = sampling[row], int(positions[row])
        tokens = functools.cache(functools.partial(history, int(record["seq_index"]), position))
        own = biases[record["seq_index"], : record["num_biases"]]
        add_biases(adjusted[row], own, position, record["num_prompt"], tokens)
        if _has_penalties(record):
            _penalise(adjusted[row], record, tokens())
    return adjusted


def _has_penalties(record: np.void) -> bool:
    return bool(record["repetition_penalty"] or record["presence_penalty"] or record["frequency_penalty"])


def _penalise(logits: Float32Array, record: np.void, tokens: Int32Array) -> None:
    """In place. Repetition: Keskar et al. 2019 (CTRL), over prompt and output; the others, OpenAI's, over the output."""
    if record["repetition_penalty"]:
        seen = np.unique(tokens)
        values, penalty = logits[seen], record["repetition_penalty"]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    generated, counts = np.unique(tokens[record["num_prompt"] :], return_counts=True)
    logits[generated] -= record["frequency_penalty"] * counts.astype(np.float32)
    logits[generated] -= record["presence_penalty"]
