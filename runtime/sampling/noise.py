# SPDX-License-Identifier: Apache-2.0
"""Seeds of sequences whose request names none, or one for several answers."""

from __future__ import annotations

__all__ = ["split_mix64"]

_MASK = 2**64 - 1


def split_mix64(seed: int, number: int) -> int:
    """Element ``number`` of the SplitMix64 sequence that starts at ``seed`` (Steele, Lea, Flood 2014), as 64 unsigned bits."""
    word = (seed + number * 0x9E3779B97F4A7C15) & _MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)
