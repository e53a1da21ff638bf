# SPDX-License-Identifier: Apache-2.0
"""Activations of the feed-forward part. Every call enqueues on the current stream and does not wait."""

from __future__ import annotations

from typing import Literal

from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import KernelFunction, Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["ACTIVATIONS", "ActivationName", "activation", "gated_activation"]

ActivationName = Literal["silu", "gelu_tanh", "gelu_erf", "relu"]
ACTIVATIONS: tuple[ActivationName, ...] = ("silu", "gelu_tanh", "gelu_erf", "relu")
_LARGEST_BLOCK = 256


def gated_activation(library: Library, x: Array, out: Array, name: ActivationName) -> None:
    """``out = f(gate) * up`` for x = [gate | up]. x [T, 2F]; out [T, F]."""
    num_tokens, features = out.shape
    require("x", x, (num_tokens, 2 * features), out)
    require("out", out, (num_tokens, features), out)
    kernel, grid, block = _kernel(library, "gated", out, name, has_bias=False)
    kernel(grid, block, (x, out))


def activation(library: Library, x: Array, out: Array, name: ActivationName, bias: Array | None = None) -> None:
    """``out = f(x + bias)``. x, out [T, F] (out may be x); bias [F]."""
    num_tokens, features = out.shape
    require("x", x, (num_tokens, features), out)
    require("out", out, (num_tokens, features), out)
    if bias is not None:
        require("bias", bias, (features,), out)
    kernel, grid, block = _kernel(library, "plain", out, name, has_bias=bias is not None)
    kernel(grid, block, (x, bias, out))


def _kernel(
    library: Library, function: str, out: Array, name: ActivationName, has_bias: bool
) -> tuple[KernelFunction, tuple[int, int], tuple[int]]:
    if name not in ACTIVATIONS:
        raise ExecutorError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    num_tokens, features = out.shape
    width = vector_width(out, features)
    num_threads = num_threads_for(features // width, _LARGEST_BLOCK)
    kernel = library.function(
        "activation",
        function,
        SCALAR=scalar_name(out),
        FEATURES=features,
        VEC=width,
        NUM_THREADS=num_threads,
        ACTIVATION=name,
        HAS_BIAS=int(has_bias),
    )
    return kernel, (ceil_div(features, width * num_threads), num_tokens), (num_threads,)
