# SPDX-License-Identifier: Apache-2.0
"""Token biases: numbers that are added to the logits of single tokens before one is chosen.

Fields that make tokens more or less likely by themselves (``logit_bias``, end tokens before ``min_tokens``) or after certain others
(``bad_words``) become one list a sequence, built when it is admitted. Ranks keep the lists, so a step in steady decoding carries
nothing of them. Log-probabilities stay those of the model: biases change the choice alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import MAX_TOKEN_BIASES, SamplingParams
from phalanx.runtime.sampling.rules import MAX_INT32

__all__ = ["BAN", "MAX_TOKEN_BIASES", "TokenBias", "add_biases", "token_biases"]

TokenBias = tuple[int, float, int, int]
"""Token, bias, the position from which on it no longer counts, and how many of the following entries are tokens that must come
before it in the output, the nearest first."""

Tokens = Callable[[], NDArray[np.int32]]
"""Gives the tokens of one sequence, where they are needed."""

BAN = -1e30
"""The bias of a token that must not be chosen. Finite, so that a logit that is not finite still shows; after any penalty and divided
by the lowest temperature it fits a float32. A banned token is chosen only where all are banned."""


def token_biases(params: SamplingParams, num_prompt: int, end_token_ids: tuple[int, ...]) -> list[TokenBias]:
    """The list of one sequence; a token that occurs twice gets the sum, but no less than `BAN`.

    Raises:
        RequestError: it has more than `MAX_TOKEN_BIASES` entries.
    """
    until = num_prompt + params.min_tokens
    entries = [(token, BAN, until, 0) for token in dict.fromkeys(end_token_ids)] if params.min_tokens else []
    entries += [(token, bias, MAX_INT32, 0) for token, bias in params.logit_bias]
    for *before, last in dict.fromkeys(params.bad_token_ids):
        entries.append((last, BAN, MAX_INT32, len(before)))
        entries += [(token, 0.0, 0, 0) for token in reversed(before)]
    if len(entries) > MAX_TOKEN_BIASES:
        raise RequestError(
            f"logit_bias, bad words and end tokens before min_tokens need {len(entries)} token biases; use at most {MAX_TOKEN_BIASES}",
            "bad_words" if params.bad_token_ids else "min_tokens",
        )
    return entries


def add_biases(
    logits: NDArray[np.float32], biases: NDArray[np.void], position: int, num_prompt: int, tokens: Tokens
) -> None:
    """Add the biases that count at ``position`` to one row of logits, in place.

    Args:
        logits: ``[V]``
        biases: of `phalanx.runtime.step.TOKEN_BIAS`, the list of the row's sequence.
        tokens: the sequence's tokens before ``position``, of which the first ``num_prompt`` are its prompt's.
    """
    counts = position < biases["until"]
    for index in np.flatnonzero(counts & (biases["num_before"] > 0)):
        before = biases["token"][index + 1 : index + 1 + biases["num_before"][index]][::-1]
        counts[index] = np.array_equal(tokens()[num_prompt:][-len(before) :], before)
    entries = biases[counts]
    np.add.at(logits, entries["token"], entries["bias"])
    banned = entries["token"][np.isfinite(logits[entries["token"]])]
    logits[banned] = np.maximum(logits[banned], np.float32(BAN))
