# SPDX-License-Identifier: Apache-2.0
"""Rows weighed by a gate. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from phalanx.kernels.arrays import Array, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import Library

__all__ = ["sigmoid_gate"]

_MOST_THREADS = 256


def sigmoid_gate(library: Library, x: Array, y: Array, weight: Array) -> None:
    """``x[t] *= sigmoid(y[t] . weight)``, in place. x, y [T, D]; weight [1, D]."""
    num_tokens, features = x.shape
    require("x", x, (num_tokens, features), x)
    require("y", y, (num_tokens, features), x)
    require("weight", weight, (1, features), x)
    width = vector_width(x, features)
    threads = num_threads_for(features // width, _MOST_THREADS)
    kernel = library.function(
        "sigmoid_gate", "sigmoid_gate", SCALAR=scalar_name(x), FEATURES=features, VEC=width, NUM_THREADS=threads
    )
    kernel((num_tokens,), (threads,), (x, y, weight))
