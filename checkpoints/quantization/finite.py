# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose matrices can be quantised: codes and scales stand for finite numbers only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo, TensorSource
from phalanx.parallel.errors import CheckpointError

__all__ = ["FiniteSource"]


@dataclass(frozen=True, slots=True)
class FiniteSource:
    """Tensors of ``source``, of which those named ``matrices`` are looked at as they are read. A `TensorSource`."""

    source: TensorSource
    matrices: Collection[str]

    def names(self) -> Collection[str]:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        """As that of ``source``.

        Raises:
            CheckpointError: a matrix holds a value that is not finite.
        """
        array = self.source.read(name, index, buffer)
        if name in self.matrices and not (is_finite := np.isfinite(array)).all():
            raise CheckpointError(
                f"tensor {name!r}: holds {array[~is_finite][0]}, and no code stands for a value that is not finite; copy the checkpoint "
                "again, or take one from before its training diverged"
            )
        return array
