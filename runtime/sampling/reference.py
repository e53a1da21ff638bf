# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens from logits: the reference that every executor's sampler must agree with.

Random tokens come from the Gumbel-max trick: ``argmax(logit / temperature + gumbel)`` over the tokens that the filters keep.
The noise is a pure function of (seed, position, token id), so a request's tokens depend neither on what else is in the batch
nor on how the vocabulary is split. Filters, in order: top-k, top-p on what is left, min-p. Equal logits rank by token id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gumbel_noise", "log_softmax", "philox", "sample", "top_logprobs"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
UInt32Array = NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[UInt32Array, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for a counter of four 32-bit words. Counters broadcast."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Float32Array:
    """``[V]`` Gumbel(0, 1) noise of one token choice. Token i uses word ``i & 3`` of counter (i >> 2, position, 0, 0)."""
    counters = np.arange(-(-vocab_size // 4))
    words = philox((counters, position & 0xFFFFFFFF, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    bits = np.stack(words, axis=-1).reshape(-1)[:vocab_size]
    # 23 bits and a half are exact in float32. 24 would round the largest to 1, and its noise to infinity.
    uniform = ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    noise: Float32Array = -np.log(-np.log(uniform))
    return noise


def sample(logits: Float32Array, sampling: NDArray[np.void], positions: Int32Array) -> Int32Array:
    """One token for each row: ``[Q, V] -> [Q]``; -1 where a row's logits are not all finite.

    Args:
        logits: unscaled, over the whole vocabulary.
        sampling: ``[Q]`` records of `phalanx.runtime.step.ADMISSION`.
        positions: ``[Q]`` position that the new token takes in its sequence.
    """
    tokens: Int32Array = logits.argmax(axis=1).astype(np.int32)
    for row in np.flatnonzero(sampling["temperature"] > 0):
        tokens[row] = _sample_row(logits[row], sampling[row], int(positions[row]))
    tokens[~np.isfinite(logits).all(axis=1)] = -1
    return tokens


def _sample_row(logits: Float32Array, params: np.void, position: int) -> int:
    scaled = logits / np.float32(params["temperature"])
    scores = scaled + gumbel_noise(int(params["seed"]), position, len(logits))
    top_k, top_p, min_p = int(params["top_k"]), float(params["top_p"]), float(params["min_p"])
    if 0 < top_k < len(logits) or top_p < 1.0:
        ranked = np.argsort(-scaled, kind="stable")
        kept = ranked[:top_k] if top_k > 0 else ranked
        if top_p < 1.0:
            mass = np.cumsum(np.exp(scaled[kept] - scaled[kept[0]]))
            kept = kept[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
        dropped = np.ones(len(logits), bool)
        dropped[kept] = False
        scores[dropped] = -np.inf
    if min_p > 0.0:
        scores[scaled < scaled.max() + np.log(np.float32(min_p))] = -np.inf
    return int(scores.argmax())


def log_softmax(logits: Float32Array) -> Float32Array:
    """Natural log-probabilities over the last axis: ``[B, V]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs: Float32Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs


def top_logprobs(logprobs: Float32Array, count: int) -> tuple[Int32Array, Float32Array]:
    """The ``count`` most probable tokens of each row, most probable first: ids and values, ``[B, count]``.

    A vocabulary smaller than ``count`` leaves ids of -1 at the end.
    """
    ids = np.full((len(logprobs), count), -1, np.int32)
    values = np.full((len(logprobs), count), -np.inf, np.float32)
    ranked = np.argsort(-logprobs, axis=1, kind="stable")[:, :count]
    ids[:, : ranked.shape[1]] = ranked
    values[:, : ranked.shape[1]] = np.take_along_axis(logprobs, ranked, axis=1)
    return ids, values
