# SPDX-License-Identifier: Apache-2.0
"""Matrices whose rows count by their direction alone, as the LM head of Baichuan 2 ("NormHead")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phalanx.checkpoints.encoding import Block

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = ["UnitRows"]


@dataclass(frozen=True, slots=True)
class UnitRows:
    """Rows are divided by their length when they are loaded; splits keep them as they are stored."""

    @property
    def dtypes(self) -> frozenset[str]:
        from phalanx.checkpoints.dtypes import FLOAT_DTYPES  # not above: launch.plan runs without NumPy

        return frozenset(FLOAT_DTYPES)

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return Block(), Block(extents[1], extents[1])

    def decode(self, stored: Array) -> Array:
        import numpy as np

        wide = stored.astype(np.float32)
        length = np.sqrt(np.einsum("vd,vd->v", wide, wide))
        wide /= np.maximum(length, np.float32(1e-12))[:, None]
        return wide
