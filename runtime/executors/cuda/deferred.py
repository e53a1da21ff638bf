# SPDX-License-Identifier: Apache-2.0
"""Results that wait for their consumer, which knows in which form it takes them: plain values, or codes with scales.

A product with a quantised weight takes codes, one with a float weight values; the norm or activation before it can write
either in one kernel, but model files name neither. So with quantised weights such an operation returns a `Deferred`, and the
operation that follows, in program order, makes it: `CudaOps` holds at most one at a time, and every operation that is not a
product makes it as plain values first. No kernel changes its place among the others by this.

A norm that was made as codes may be asked for in another form later, when the sum that it norms, the residual, has gone on in place. So before
an operation overwrites a norm's source, a norm that the model still refers to is made as values (`Deferred.keep`). A block that gives the name
to its next result first, as built-in ones do, pays nothing.

In the same way a product of few tokens, or of codes, waits for the gated activation that may follow: kernels that stream a weight, and the one
of tiles of codes, compute both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.product_sizes import BLOCK, packed_row_bytes, padded_tokens
from phalanx.kernels.quantize import CodeRule, QuantizedRows
from phalanx.kernels.quantize_groups import QuantizedGroups
from phalanx.runtime.executors.cuda.activations import ActivationPool
from phalanx.runtime.executors.cuda.memory import DeviceArray

__all__ = ["Deferred", "DeferredProduct", "Rows", "quantized_groups", "quantized_rows"]

Write = Callable[["DeviceArray | QuantizedRows | QuantizedGroups"], None]
"""Enqueues the kernel that fills its argument, in the form that the argument has."""


class Deferred:
    """One result of ``[T, D]``, made at most once in each form.

    Args:
        write: makes it the first time.
        write_again: makes it in another form afterwards, when inputs may have been updated in place.
        writes_groups: whether they make `QuantizedGroups`, too.
        source: what ``write_again`` reads, if operations may overwrite it while this result is in use.

    Attributes:
        is_kept: only `values` is left to make others of; see `keep`.
    """

    __slots__ = (
        "__weakref__", "_codes", "_groups", "_pool", "_values", "_write", "_write_again", "dtype", "is_kept", "shape", "source",
        "writes_groups",
    )  # fmt: skip

    def __init__(
        self, pool: ActivationPool, shape: tuple[int, int], dtype: Any, write: Write, write_again: Write,
        writes_groups: bool = False, source: DeviceArray | None = None,
    ) -> None:  # fmt: skip
        self._pool, self.shape, self.dtype, self.writes_groups = pool, shape, dtype, writes_groups
        self._write, self._write_again, self.source, self.is_kept = write, write_again, source, False
        self._values: DeviceArray | None = None
        self._codes: dict[CodeRule, QuantizedRows] = {}
        self._groups: dict[bool, QuantizedGroups] = {}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_pending(self) -> bool:
        """Whether no kernel has run yet."""
        return self._values is None and not self._codes and not self._groups

    def values(self) -> DeviceArray:
        """``[T, D]`` in the compute type."""
        if self._values is None:
            self._values = self._filled(self._pool.array(self.shape, self.dtype))
        return self._values

    def keep(self) -> None:
        """Make `values` now, because ``source`` is about to be overwritten."""
        self.values()
        self.source, self.is_kept = None, True

    def codes(self, rule: CodeRule) -> QuantizedRows:
        """The codes of what `values` would hold."""
        if rule not in self._codes:
            self._codes[rule] = self._filled(quantized_rows(self._pool, self.shape, rule))
        return self._codes[rule]

    def groups(self, powers_of_two: bool) -> QuantizedGroups:
        """The codes in groups of what `values` would hold; where ``writes_groups``."""
        if powers_of_two not in self._groups:
            self._groups[powers_of_two] = self._filled(quantized_groups(self._pool, self.shape, powers_of_two))
        return self._groups[powers_of_two]

    def _filled(self, out: Any) -> Any:
        self._write(out)
        self._write = self._write_again  # and what only the first call needed can be freed
        return out


class DeferredProduct:
    """A product ``[T, O]``, whose consumer may be a gated activation that the same kernel computes.

    Args:
        write: enqueues the product.
        write_gated: enqueues product and activation, if one kernel does both; False if not.
    """

    __slots__ = ("_pool", "_values", "_write", "_write_gated", "dtype", "shape")

    def __init__(
        self, pool: ActivationPool, shape: tuple[int, int], dtype: Any, write: Callable[[DeviceArray], None],
        write_gated: Callable[[DeviceArray, ActivationName], bool],
    ) -> None:  # fmt: skip
        self._pool, self.shape, self.dtype = pool, shape, dtype
        self._write, self._write_gated = write, write_gated
        self._values: DeviceArray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_pending(self) -> bool:
        """Whether no kernel has run yet."""
        return self._values is None

    def values(self) -> DeviceArray:
        """``[T, O]``."""
        if self._values is None:
            self._values = self._pool.array(self.shape, self.dtype)
            self._write(self._values)
        return self._values

    def gated(self, name: ActivationName) -> DeviceArray | None:
        """``f(gate) * up`` ``[T, O / 2]`` of the product ``[gate | up]``, if one kernel makes both; None if none does."""
        out = self._pool.array((self.shape[0], self.shape[1] // 2), self.dtype)
        return out if self._write_gated(out, name) else None


Rows = Any
"""A `DeviceArray`, a `Deferred` or a `DeferredProduct`."""


def quantized_rows(pool: ActivationPool, shape: tuple[int, int], rule: CodeRule) -> QuantizedRows:
    """Uninitialised codes and scales for the rest of the step."""
    return QuantizedRows(pool.array(shape, "uint8"), pool.array(shape[:1], "float32"), rule.kind, rule)


def quantized_groups(pool: ActivationPool, shape: tuple[int, int], powers_of_two: bool) -> QuantizedGroups:
    """Uninitialised codes of inputs ``[T, I]`` with a scale for each group of columns, for the rest of the step."""
    rows, columns = padded_tokens(shape[0]), shape[1]
    codes = pool.array((rows, packed_row_bytes(columns, "fp8")), "uint8")
    return QuantizedGroups(codes, pool.array((-(-columns // BLOCK), rows), "float32"), powers_of_two)
