# SPDX-License-Identifier: Apache-2.0
"""Norms of query and key heads. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name
from phalanx.kernels.library import Library

__all__ = ["head_norm"]

_NUM_THREADS = 128


def head_norm(
    library: Library, qkv: Array, query_weight: Array, key_weight: Array, *, num_heads: int, num_kv_heads: int,
    epsilon: float, weight_offset: float, is_layer_norm: bool = False, query_bias: Array | None = None,
    key_bias: Array | None = None,
) -> None:  # fmt: skip
    """``x / sqrt(mean(x**2) + epsilon) * (weight_offset + weight) + bias`` of each query and key head, in place.

    qkv [T, (H + 2K) * C] = [queries | keys | values]; weights [C], or [H, C] and [K, C], which may be flat; biases like them, both or
    neither. ``is_layer_norm``: ``x - mean(x)`` for x.
    """
    num_tokens, columns = qkv.shape
    head_dim = columns // (num_heads + 2 * num_kv_heads)
    own_weights = query_weight.size != head_dim
    has_bias = query_bias is not None and key_bias is not None
    vectors = {"query_weight": (query_weight, num_heads), "key_weight": (key_weight, num_kv_heads),
               "query_bias": (query_bias, num_heads), "key_bias": (key_bias, num_kv_heads)}  # fmt: skip
    for name, (vector, heads) in vectors.items():
        size = heads * head_dim if own_weights else head_dim
        if vector is not None:
            require(name, vector, (heads, head_dim) if len(vector.shape) == 2 else (size,), qkv)
    kernel = library.function(
        "head_norm", "head_norm", SCALAR=scalar_name(qkv), NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim, NUM_THREADS=_NUM_THREADS,
        OWN_WEIGHTS=int(own_weights), LAYER_NORM=int(is_layer_norm), HAS_BIAS=int(has_bias),
    )  # fmt: skip
    warps = num_tokens * (num_heads + num_kv_heads)
    arguments = (qkv, query_weight, key_weight, query_bias, key_bias, np.int32(num_tokens))
    numbers = (np.float32(epsilon), np.float32(weight_offset))
    kernel((ceil_div(warps, _NUM_THREADS // 32),), (_NUM_THREADS,), (*arguments, *numbers))
