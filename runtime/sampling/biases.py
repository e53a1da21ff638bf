# SPDX-License-Identifier: Apache-2.0
"""Token biases: numbers that are added to the logits of single tokens before one is chosen.

Fields that make tokens more or less likely by themselves (``logit_bias``, end tokens before ``min_tokens``) become one list a
sequence, built when it is admitted. Ranks keep the lists, so a step in steady decoding carries nothing of them. Log-probabilities
stay those of the model: biases change the choice alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import SamplingParams
from phalanx.runtime.sampling.rules import MAX_INT32

__all__ = ["BAN", "MAX_TOKEN_BIASES", "TokenBias", "add_biases", "token_biases"]

TokenBias = tuple[int, float, int]
"""Token, bias, and the position from which on it no longer counts."""

MAX_TOKEN_BIASES = 256
"""Most entries of one sequence's list; bounds what ranks keep and what a plan carries."""

BAN = -1e30
"""The bias of a token that must not be chosen. Finite, so that a logit that is not finite still shows; divided by the lowest
temperature it fits a float32. A banned token is chosen only where all are banned."""


def token_biases(params: SamplingParams, num_prompt: int, end_token_ids: tuple[int, ...]) -> list[TokenBias]:
    """The list of one sequence; a token that occurs twice gets the sum.

    Raises:
        RequestError: it has more than `MAX_TOKEN_BIASES` entries.
    """
    until = num_prompt + params.min_tokens
    banned = [(token, BAN, until) for token in dict.fromkeys(end_token_ids)] if params.min_tokens else []
    entries = [*banned, *((token, bias, MAX_INT32) for token, bias in params.logit_bias)]
    if len(entries) > MAX_TOKEN_BIASES:
        raise RequestError(
            f"min_tokens with {len(banned)} end tokens and logit_bias of {len(params.logit_bias)} need as many token biases; "
            f"use at most {MAX_TOKEN_BIASES}",
            "min_tokens",
        )
    return entries


def add_biases(logits: NDArray[np.float32], biases: NDArray[np.void], position: int) -> None:
    """Add the biases that still count at ``position`` to one row of logits, in place.

    Args:
        logits: ``[V]``
        biases: of `phalanx.runtime.step.TOKEN_BIAS`, the list of the row's sequence.
    """
    entries = biases[position < biases["until"]]
    np.add.at(logits, entries["token"], entries["bias"])
