# SPDX-License-Identifier: Apache-2.0
"""How stored tensors hold the values of a weight where one stored element is not one value: packed words, shared scales.

Pure declarations, so that planning needs neither NumPy nor a checkpoint; only `Encoding.decode` touches arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = ["Block", "Encoding"]


class Block(NamedTuple):
    """Along one axis, ``stored`` consecutive elements hold ``values`` consecutive values and cannot be read apart."""

    stored: int = 1
    values: int = 1


class Encoding(Protocol):
    """From whole blocks of a stored tensor to values. Hashable and comparable by value: parts with it are dictionary keys."""

    @property
    def dtypes(self) -> frozenset[str]:
        """Stored formats that `decode` takes, by their safetensors names."""
        ...

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        """The block of each axis of a source with ``extents`` values; axes in our ``[out, in]`` orientation.

        Eight 4-bit codes in a word are ``Block(1, 8)``, a scale for 128 rows ``Block(1, 128)``, a scale for the whole
        tensor ``Block(1, extent)``, columns stored in another order ``Block(extent, extent)``.
        """
        ...

    def decode(self, stored: Array) -> Array:
        """Values of whole blocks, in the dtype of the component: ``[n stored, ...] -> [n values, ...]`` along each axis.

        The last block may be short in the source; what lies beyond its end is cut off by the caller.
        """
        ...
