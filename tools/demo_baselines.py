# SPDX-License-Identifier: Apache-2.0
"""Two baselines that the demo checkpoint has to beat on the held-out files, both in float64 NumPy.

- A unigram over the checkpoint's own tokens, add-one smoothed: what knowing only the frequencies is worth.
- A byte 5-gram with interpolated back-off (Kneser and Ney 1995; the interpolated form of Chen and Goodman
  1999, one absolute discount an order): what a good model without a network is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS_PER_BYTE_OF_KEY = 8
NUM_BYTES = 256


def unigram_loss(train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int) -> float:
    """Mean nats a token of `held_out` `[T]` under the add-one smoothed token frequencies of `train`."""
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


@dataclass(frozen=True, slots=True)
class _Order:
    """The counts of all n-grams of one order; an n-gram is one integer key, its last byte the lowest."""

    grams: NDArray[np.uint64]  # sorted
    gram_counts: NDArray[np.float64]
    histories: NDArray[np.uint64]  # sorted
    history_counts: NDArray[np.float64]
    history_distinct: NDArray[np.float64]  # how many different bytes followed the history
    discount: float


class ByteNgram:
    """An interpolated Kneser-Ney model over bytes; a document is read as if NUL bytes preceded it."""

    def __init__(self, documents: Sequence[bytes], order: int = 5) -> None:
        keys = np.concatenate([_keys(document, order) for document in documents])
        grams, counts = np.unique(keys, return_counts=True)
        orders = [_order(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Shorter n-grams count the different bytes they follow, not how often they occur.
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            orders.append(_order(grams, counts))
        self._orders = tuple(reversed(orders))

    def probabilities(self, document: bytes) -> NDArray[np.float64]:
        """The probability of each byte of `document` after all bytes before it, `[len(document)]`."""
        keys = _keys(document, len(self._orders))
        result = np.full(len(keys), 1.0 / NUM_BYTES)
        for length, order in enumerate(self._orders, start=1):
            result = _interpolated(order, keys & _mask(length), result)
        return result

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Mean bits a byte over all `documents`."""
        bits = sum(float(-np.log2(self.probabilities(document)).sum()) for document in documents)
        return bits / sum(len(document) for document in documents)


def _interpolated(order: _Order, keys: NDArray[np.uint64], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    """This order's discounted estimate plus what it gives away, shared out by the shorter order's."""
    count = _look_up(order.grams, order.gram_counts, keys)
    history = keys >> np.uint64(BITS_PER_BYTE_OF_KEY)
    total = _look_up(order.histories, order.history_counts, history)
    distinct = _look_up(order.histories, order.history_distinct, history)
    seen = total > 0
    mass = np.maximum(count - order.discount, 0.0) + order.discount * distinct * shorter
    return np.where(seen, mass / np.where(seen, total, 1.0), shorter)


def _order(grams: NDArray[np.uint64], counts: NDArray[np.integer]) -> _Order:
    histories, starts, distinct = np.unique(
        grams >> np.uint64(BITS_PER_BYTE_OF_KEY), return_index=True, return_counts=True
    )
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return _Order(
        grams=grams,
        gram_counts=counts.astype(np.float64),
        histories=histories,
        history_counts=np.add.reduceat(counts, starts).astype(np.float64),
        history_distinct=distinct.astype(np.float64),
        discount=once / (once + 2 * twice) if once and twice else 0.5,
    )


def _keys(document: bytes, order: int) -> NDArray[np.uint64]:
    """The key of the `order` bytes that end at each byte, `[len(document)]`."""
    padded = np.frombuffer(bytes(order - 1) + document, dtype=np.uint8).astype(np.uint64)
    keys = np.zeros(len(document), dtype=np.uint64)
    for offset in range(order):
        keys = (keys << np.uint64(BITS_PER_BYTE_OF_KEY)) | padded[offset : offset + len(document)]
    return keys


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << (BITS_PER_BYTE_OF_KEY * length)) - 1)


def _look_up(keys: NDArray[np.uint64], values: NDArray[np.float64], wanted: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The value beside each wanted key; 0 where the key was never seen."""
    positions = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[positions] == wanted, values[positions], 0.0)
