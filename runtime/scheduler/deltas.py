# SPDX-License-Identifier: Apache-2.0
"""What steps did to requests: columns for the many plain tokens, objects for the few special ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.request import TokenDelta
from phalanx.runtime.scheduler.sequences import Int32Array, Int64Array

__all__ = ["DeltaBatch"]


@dataclass(slots=True)
class DeltaBatch:
    """What happened in one step and until the next: read the columns first, then ``deltas``.

    Making an object for each of a thousand tokens would cost more than planning the step, so a reader of many
    sequences takes the columns (offline generation appends arrays, the HTTP side sends them to its process as
    they are).

    Attributes:
        request_ids: ``[num_tokens]`` of str, requests that got one plain token: no log-probability, not the end.
        numbers: ``[num_tokens]`` what `Scheduler.submit` returned for them.
        token_ids: ``[num_tokens]`` their tokens.
        deltas: everything else: ends, errors, log-probabilities, prefix hits.
    """

    request_ids: NDArray[np.object_] = field(default_factory=lambda: np.empty(0, np.object_))
    numbers: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    token_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    deltas: list[TokenDelta] = field(default_factory=list)

    def objects(self) -> list[TokenDelta]:
        """One `TokenDelta` for each request in the batch."""
        plain = zip(self.request_ids.tolist(), self.token_ids.tolist(), strict=True)
        return [*(TokenDelta(request_id, (token,)) for request_id, token in plain), *self.deltas]
