# SPDX-License-Identifier: Apache-2.0
"""What one kind of attention does to queries, keys and scores: head norms, rotation, caps, biases, masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.attention import AttentionSpec, HeadNorm, LocalHeads

__all__ = ["AttentionKind", "normalise_heads", "rotate", "softmax"]

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """A spec on one rank.

    Attributes:
        heads: this rank's heads.
        slopes: ``[K, G, 1, 1]`` ALiBi slopes of its query heads, or None.
    """

    spec: AttentionSpec
    heads: LocalHeads
    slopes: Float32Array | None

    @staticmethod
    def of(spec: AttentionSpec, rank: int, size: int) -> AttentionKind:
        """The share of ``rank`` of ``size`` tensor-parallel ranks."""
        heads, slopes = LocalHeads.of(spec, rank, size), None
        if spec.alibi_slopes is not None:
            own = spec.alibi_slopes[heads.heads.start : heads.heads.stop]
            slopes = np.array(own, np.float32).reshape(heads.num_kv_heads, -1, 1, 1)
        return AttentionKind(spec, heads, slopes)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads.num_heads // self.heads.num_kv_heads

    def shape_scores(
        self, scores: Float32Array, query_positions: Int32Array, key_positions: Int32Array, last: Int32Array,
        num_prefix: int = 0,
    ) -> None:  # fmt: skip
        """Soft cap, ALiBi, mask, in place: scores ``[K, G, rows, L]``, query positions ``[rows, 1]``.

        ``last``: position of each row's sequence's last token, ``[rows, 1]`` or one for all; keys after it are padding.
        ``num_prefix``: keys before this position are seen from anywhere.
        """
        spec = self.spec
        if spec.soft_cap:
            np.tanh(scores / np.float32(spec.soft_cap), out=scores)
            scores *= np.float32(spec.soft_cap)
        distance = query_positions - key_positions
        if self.slopes is not None:
            scores -= self.slopes * distance.astype(np.float32)
        hidden = distance < 0 if spec.causal else key_positions > last
        if num_prefix:
            hidden &= key_positions >= num_prefix
        if spec.window:
            hidden |= distance >= spec.window
        if hidden.any():
            np.copyto(scores, -np.inf, where=hidden)


def normalise_heads(x: Float32Array, weight: Float32Array, bias: Float32Array | None, norm: HeadNorm) -> None:
    """Norm of each head in place: ``[T, heads, C]``, weight and bias ``[C]``, or ``[heads, C]``, which may be flat."""
    if norm.kind == "layer":
        x -= x.mean(axis=-1, keepdims=True)
    mean_square = np.einsum("thc,thc->th", x, x) / np.float32(x.shape[-1])
    x *= (np.float32(1) / np.sqrt(mean_square + np.float32(norm.eps)))[..., None]
    x *= weight.reshape(-1, x.shape[-1]) + np.float32(norm.weight_offset)
    if bias is not None:
        x += bias.reshape(-1, x.shape[-1])


def rotate(x: Float32Array, cos: Float32Array, sin: Float32Array, interleaved: bool) -> None:
    """Rotate pairs of each head's leading channels in place: ``[T, heads, C]``, tables ``[T, 1, rotary_dim / 2]``."""
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    rotated = first * cos - second * sin
    second *= cos
    second += first * sin
    first[...] = rotated


def softmax(scores: Float32Array) -> None:
    """Softmax over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
