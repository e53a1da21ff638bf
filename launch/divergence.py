# SPDX-License-Identifier: Apache-2.0
"""How far one model's distribution of the next token is from a reference's: Kullback-Leibler divergence and flips.

Over the whole vocabulary and exact but for the rounding of the logits themselves: both models' are kept (`KeptLogits`), and sums are of
float64. No rank sees a whole row. For logits a of the reference and b of the model

    KL = sum p (a - b) - log sum exp(a) + log sum exp(b),    p = exp(a) / sum exp(a)

and each of the three sums adds up over parts of the vocabulary, once all are relative to the same largest logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from phalanx.launch.kept_logits import KeptLogits
    from phalanx.parallel.communicator import Communicator

__all__ = ["Divergence", "PartialSums", "compare"]

Float64Array = NDArray[np.float64]

_PLACES_AT_ONCE = 64
"""Rows of logits that ranks hold, and send each other, at once."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of a model from a reference, for T places.

    Attributes:
        kl: ``[T]`` KL(reference || model) in nats.
        flips: ``[T]`` whether the most probable token is another.
    """

    kl: Float64Array
    flips: NDArray[np.bool_]

    @property
    def mean(self) -> float:
        """Mean nats a token."""
        return float(self.kl.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, as if tokens were independent."""
        return float(self.kl.std()) / math.sqrt(len(self.kl))

    @property
    def figures(self) -> dict[str, float]:
        """For machines."""
        return {
            "kl": self.mean,
            "kl_standard_error": self.standard_error,
            "kl_largest": float(self.kl.max()),
            "num_flips": int(self.flips.sum()),
            "flips": float(self.flips.mean()),
            "top1_agreement": float(1.0 - self.flips.mean()),
        }

    @property
    def description(self) -> str:
        """For people."""
        return (
            f"KL(reference || model)  {self.mean:z.5f} nats a token (standard error {self.standard_error:.5f}; "
            f"largest {self.kl.max():z.4f})\n"
            f"same best token         {100 * (1 - self.flips.mean()):.2f} % ({self.flips.sum():,} of {len(self.flips):,} changed)"
        )


@dataclass(slots=True)
class PartialSums:
    """Of T places over a part of the vocabulary, reference first; empty parts have -inf and 0.

    Attributes:
        top, other_top: ``[T]`` largest logits.
        total, other_total: ``[T]`` sums of ``exp(logit - top)``.
        weighted: ``[T]`` sum of ``exp(a - top) * (a - b)``.
        best, other_best: ``[T]`` the tokens with the largest logits, the first of equals.
    """

    top: Float64Array
    total: Float64Array
    weighted: Float64Array
    best: Float64Array
    other_top: Float64Array
    other_total: Float64Array
    other_best: Float64Array

    @classmethod
    def empty(cls, num_places: int) -> PartialSums:
        """Of no tokens."""
        start = {"top": -np.inf, "other_top": -np.inf}
        return cls(*(np.full(num_places, start.get(field.name, 0.0)) for field in fields(cls)))

    @classmethod
    def of(cls, a: NDArray[np.float32], b: NDArray[np.float32], first_token: int) -> PartialSums:
        """Of logits ``[T, tokens]`` of the reference and of the model."""
        wide, other = a.astype(np.float64), b.astype(np.float64)
        best, other_best = wide.argmax(axis=1), other.argmax(axis=1)
        top, other_top = wide.max(axis=1), other.max(axis=1)
        p, q = np.exp(wide - top[:, None]), np.exp(other - other_top[:, None])
        wide -= other
        terms = np.where(p > 0, p * wide, 0.0)
        return cls(
            top, p.sum(axis=1), terms.sum(axis=1), (best + first_token).astype(np.float64),
            other_top, q.sum(axis=1), (other_best + first_token).astype(np.float64),
        )  # fmt: skip

    def __add__(self, other: PartialSums) -> PartialSums:
        """Over both parts."""
        first, second = _factors(self.top, other.top)
        third, fourth = _factors(self.other_top, other.other_top)
        return PartialSums(
            np.maximum(self.top, other.top),
            self.total * first + other.total * second,
            self.weighted * first + other.weighted * second,
            _better(self.top, self.best, other.top, other.best),
            np.maximum(self.other_top, other.other_top),
            self.other_total * third + other.other_total * fourth,
            _better(self.other_top, self.other_best, other.other_top, other.other_best),
        )

    def divergence(self) -> Divergence:
        """Once the whole vocabulary is in."""
        kl = self.weighted / self.total - (self.top + np.log(self.total)) + self.other_top + np.log(self.other_total)
        return Divergence(kl, self.best != self.other_best)


def compare(reference: KeptLogits, model: KeptLogits, world: Communicator) -> Divergence:
    """The divergence of ``model`` from ``reference`` on the same text, on every rank. *Collective.*

    Where the two were computed at other layouts, ranks send the reference's logits to where the model's are.
    """
    holders = [_shares(kept, world) for kept in (reference, model)]
    num_places = len(model.held)
    total = PartialSums.empty(num_places)
    for first in range(0, num_places, _PLACES_AT_ONCE):
        places = slice(first, min(first + _PLACES_AT_ONCE, num_places))
        own = PartialSums.empty(places.stop - first)
        for source, dest, start, stop, wanted in _overlaps(holders[0], holders[1], places):
            rows = _moved(reference, world, source, dest, (first, len(wanted), start, stop))
            if rows is not None:
                sums = PartialSums.of(rows, model.read(first, len(wanted), start, stop), start)
                own += _only(sums, wanted)
        _put(total, places, own)
        world.barrier()  # so that messages of a few places at most are on their way
    stacked = world.all_gather(np.stack([getattr(total, field.name) for field in fields(total)]))
    everything = PartialSums.empty(num_places)
    for part in stacked:
        everything += PartialSums(*part)
    assert (everything.total > 0).all(), "both models scored every token"
    return everything.divergence()


class _Share(NamedTuple):
    """Which places and tokens a rank holds."""

    first_token: int
    stop_token: int
    held: NDArray[np.bool_]


def _shares(kept: KeptLogits, world: Communicator) -> list[_Share]:
    tokens = world.all_gather(np.array([kept.first_token, kept.first_token + kept.num_tokens]))
    held = world.all_gather(kept.held.astype(np.uint8)).astype(np.bool_)
    return [_Share(int(first), int(stop), row) for (first, stop), row in zip(tokens, held, strict=True)]


def _overlaps(
    sources: list[_Share], dests: list[_Share], places: slice
) -> Iterator[tuple[int, int, int, int, NDArray[np.bool_]]]:
    """What both a rank of the reference and one of the model hold of some places: these ranks, the tokens, which places."""
    for source, (first, stop, held) in enumerate(sources):
        for dest, (other_first, other_stop, other_held) in enumerate(dests):
            wanted = held[places] & other_held[places]
            low, high = max(first, other_first), min(stop, other_stop)
            if low < high and wanted.any():
                yield source, dest, low, high, wanted


def _moved(
    kept: KeptLogits, world: Communicator, source: int, dest: int, box: tuple[int, int, int, int]
) -> NDArray[np.float32] | None:
    """Logits of ``box`` (first place, places, tokens from, to) that ``source`` holds; on ``dest`` only."""
    _, num_places, start, stop = box
    if world.rank == source:
        rows = np.ascontiguousarray(kept.read(*box))
        if source == dest:
            return rows
        world.send(rows, dest)
    elif world.rank == dest:
        return world.recv(np.empty((num_places, stop - start), np.float32), source)
    return None


def _only(sums: PartialSums, wanted: NDArray[np.bool_]) -> PartialSums:
    """``sums`` of the ``wanted`` places, and nothing of the others."""
    nothing = PartialSums.empty(len(wanted))
    return PartialSums(
        *(np.where(wanted, getattr(sums, field.name), getattr(nothing, field.name)) for field in fields(sums))
    )


def _put(total: PartialSums, places: slice, some: PartialSums) -> None:
    for field in fields(total):
        getattr(total, field.name)[places] = getattr(some, field.name)


def _factors(top: Float64Array, other: Float64Array) -> tuple[Float64Array, Float64Array]:
    """By what sums relative to either largest logit are multiplied to be relative to the larger one."""
    larger = np.maximum(top, other)
    base = np.where(np.isfinite(larger), larger, 0.0)
    return np.exp(top - base), np.exp(other - base)


def _better(top: Float64Array, best: Float64Array, other_top: Float64Array, other: Float64Array) -> Float64Array:
    is_first = (top > other_top) | ((top == other_top) & (best <= other))
    return np.where(is_first, best, other)
