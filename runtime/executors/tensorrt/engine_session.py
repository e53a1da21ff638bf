# SPDX-License-Identifier: Apache-2.0
"""What the TensorRT executor needs of one rank's engine, which runs on a GPU or in an interpreter of its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.executors.tensorrt.passes import EnginePass

__all__ = ["EngineSession", "PassOutput", "Wanted"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

Wanted = Literal["nothing", "tokens", "logits"]
"""What a rank needs of a pass: greedy decoding needs a token a row, not a vocabulary a row."""


@dataclass(frozen=True, slots=True)
class PassOutput:
    """A row for each of `EnginePass.rows`; valid until the next pass.

    Attributes:
        token_ids: most probable token, -1 where a row's logits are not all finite.
        logits: ``[n, V]``; None unless asked for.
    """

    token_ids: Int32Array
    logits: Float32Array | None


class EngineSession(Protocol):
    """One rank's engine with its caches. All ranks of a replica run the same passes in the same order."""

    @property
    def device(self) -> str:
        """What computes, in words."""
        ...

    def run(self, engine_pass: EnginePass, wanted: Wanted) -> PassOutput | None:
        """Compute a pass, taking hidden states from the previous stage and handing them to the next.

        Waits for the device and returns something only if something is wanted. *Collective over the replica.*
        """
        ...

    def close(self) -> None:
        """Finish what is in flight and release memory. *Collective over the replica.*"""
        ...
