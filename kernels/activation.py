# SPDX-License-Identifier: Apache-2.0
"""Activations of the feed-forward part. Every call enqueues on the current stream and does not wait."""

from __future__ import annotations

from phalanx.kernels.activation_names import ACTIVATIONS, ActivationName
from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import KernelFunction, Library
from phalanx.kernels.quantize import LARGEST_ROW, QuantizedRows, quantized_defines, require_codes, row_threads
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_gated_groups
from phalanx.parallel.errors import ExecutorError

__all__ = ["activation", "gated_activation"]

_LARGEST_BLOCK = 256


def gated_activation(
    library: Library, x: Array, out: Array | QuantizedRows | QuantizedGroups, name: ActivationName
) -> None:
    """``out = f(gate) * up`` for x = [gate | up]. x [T, 2F]; out [T, F].

    `QuantizedRows` and `QuantizedGroups` for ``out`` receive the codes of what would have been stored.
    """
    if isinstance(out, QuantizedGroups):
        quantize_gated_groups(library, x, out, _known(name))
        return
    if isinstance(out, QuantizedRows):
        _gated_quantized(library, x, out, name)
        return
    num_tokens, features = out.shape
    require("x", x, (num_tokens, 2 * features), out)
    require("out", out, (num_tokens, features), out)
    kernel, grid, block = _kernel(library, "gated", out, name)
    kernel(grid, block, (x, out))


def _gated_quantized(library: Library, x: Array, out: QuantizedRows, name: ActivationName) -> None:
    num_tokens, features = out.shape
    require("x", x, (num_tokens, 2 * features), x)
    require_codes(out, (num_tokens, features))
    if features > LARGEST_ROW:
        raise ExecutorError(f"{features} features are more than {LARGEST_ROW}, what the kernel keeps in registers")
    width = vector_width(x, features)
    num_threads = row_threads(library, num_tokens, features // width)
    kernel = library.function(
        "gated_quantized",
        "gated_quantized",
        SCALAR=scalar_name(x),
        FEATURES=features,
        VEC=width,
        NUM_THREADS=num_threads,
        ACTIVATION=_known(name),
        **quantized_defines(out),
    )
    kernel((num_tokens,), (num_threads,), (x, out.codes, out.scale, out.bound))


def activation(library: Library, x: Array, out: Array, name: ActivationName) -> None:
    """``out = f(x)``. x, out [T, F]; out may be x."""
    num_tokens, features = out.shape
    require("x", x, (num_tokens, features), out)
    require("out", out, (num_tokens, features), out)
    kernel, grid, block = _kernel(library, "plain", out, name)
    kernel(grid, block, (x, out))


def _kernel(
    library: Library, function: str, out: Array, name: ActivationName
) -> tuple[KernelFunction, tuple[int], tuple[int]]:
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
        ACTIVATION=_known(name),
    )
    return kernel, (num_tokens * ceil_div(features, width * num_threads),), (num_threads,)


def _known(name: ActivationName) -> ActivationName:
    if name not in ACTIVATIONS:
        raise ExecutorError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return name
