# SPDX-License-Identifier: Apache-2.0
"""`Ops` on device arrays: every operation enqueues our own kernels or cuBLASLt on the current stream and returns at once.

Results live in the activation pool and die with their last reference, so nothing here allocates device memory in a step
and the whole of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from phalanx.checkpoints.formats import DENSE
from phalanx.checkpoints.quantization.row_codes import (
    FP8_BOUNDED,
    FP8_ROWS,
    FP8_STATIC,
    INT8_ROWS,
    INT8_STATIC,
    SMOOTHQUANT,
)
from phalanx.kernels.activation import activation, gated_activation
from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.add import add
from phalanx.kernels.embedding import add_position_embedding, embedding
from phalanx.kernels.experts import MAX_CHOICES, MAX_EXPERTS, ExpertRows, Routing, combine, grouped_product, route
from phalanx.kernels.gemm import MAX_GATED_TOKENS, Gemm
from phalanx.kernels.head_norm import head_norm
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.norm import layer_norm, norm_takes_groups, rms_norm
from phalanx.kernels.packed import PackedWeight
from phalanx.kernels.quantize import CodeRule, QuantizedRows, quantize_rows
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_groups
from phalanx.kernels.round_inputs import round_inputs
from phalanx.kernels.rows import add_bias, gather_rows
from phalanx.kernels.scale_and_clip import scale_and_clip
from phalanx.kernels.sigmoid_gate import sigmoid_gate
from phalanx.kernels.soft_cap import soft_cap as cap_logits
from phalanx.kernels.step_update import StepArrays
from phalanx.parallel.nccl_comm import DeviceCommunicator
from phalanx.parallel.sharding import Span, local_experts
from phalanx.runtime.config import Activation
from phalanx.runtime.executors.capabilities import ALL_ENGINES, ANY, Capabilities, Limit
from phalanx.runtime.executors.cuda.activations import ActivationPool
from phalanx.runtime.executors.cuda.attention import CudaAttention
from phalanx.runtime.executors.cuda.block_products import block_products_in_words
from phalanx.runtime.executors.cuda.deferred import (
    Deferred,
    DeferredProduct,
    Rows,
    Write,
    quantized_groups,
    quantized_rows,
)
from phalanx.runtime.executors.cuda.matrices import CudaMatrices
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec, Ops

__all__ = ["CAPABILITIES", "CudaOps"]

_ACTIVATIONS: Mapping[Activation, ActivationName] = {
    "silu": "silu",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}


CAPABILITIES = Capabilities(
    engine="cuda",
    dtypes=frozenset({"bfloat16", "float16", "float32"}),
    features={
        **ALL_ENGINES,
        "attention.head_dim": Limit(at_most=256, multiple_of=8),
        "attention.causal": ANY,
        "attention.prefix_end": ANY,
        "attention.rope.two_dimensional": ANY,
        "attention.soft_cap": ANY,
        "attention.rope.long_factors": ANY,
        "attention.alibi_slopes": ANY,
        "attention.head_norm": ANY,
        "attention.head_norm.eps": ANY,
        "attention.head_norm.weight_offset": ANY,
        "attention.head_norm.kind": ANY,
        "attention.head_norm.own_weights": ANY,
        "attention.head_norm.has_bias": ANY,
        "logits.soft_cap": ANY,
        "experts": ANY,
        "experts.num_experts": Limit(at_most=MAX_EXPERTS),
        "experts.top_k": Limit(at_most=MAX_CHOICES),
        "experts.activation": ANY,
        "experts.renormalise": ANY,
        "sigmoid_gate": ANY,
    },
    formats=frozenset(
        {
            DENSE.name,
            FP8_ROWS.name,
            FP8_STATIC.name,
            FP8_BOUNDED.name,
            INT8_ROWS.name,
            INT8_STATIC.name,
            SMOOTHQUANT.name,
        }
    ),
)


class CudaOps(Ops[DeviceArray]):
    """One rank's operations; `bind` sets the sizes of the step, whose contents the kernels read on the device.

    After the last block's attention tokens no longer interact, so only rows that need logits are computed further:
    of a 2,048-token prompt one row takes part in the last block's output projection and feed-forward part.

    With quantised weights norms and gated activations return `Deferred`: the product that follows makes them as codes (of rows or of
    groups), any other operation as plain values.

    Args:
        num_layers: blocks of the whole model.
        weights: this rank's shard.
        vocabulary: rows of the vocabulary that this rank holds.
        group: the tensor-parallel group.
    """

    def __init__(
        self, num_layers: int, library: KernelLibrary, gemm: Gemm, weights: Weights[DeviceArray], vocabulary: Span,
        group: DeviceCommunicator, arrays: StepArrays, pool: ActivationPool, attention: CudaAttention,
    ) -> None:  # fmt: skip
        self._library, self._gemm, self._weights, self._vocabulary = library, gemm, weights, vocabulary
        self._group, self._arrays, self._pool, self._attention = group, arrays, pool, attention
        self._last_layer = num_layers - 1
        self._num_rows = 0
        self._num_kept = 0
        self._logit_rows, self.stops_before_logits = range(0), False
        self._matrices = CudaMatrices(weights)
        self._pending: Deferred | DeferredProduct | None = None
        self._norms = WeakSet[Deferred]()

    def bind(self, num_rows: int, has_prefill: bool, num_kept: int) -> None:
        """Start a step of ``num_rows`` tokens, padding included. What the last step left in the pool is overwritten.

        ``num_kept``: rows with logits that are computed after the last attention; 0 = all rows.
        """
        self._pending = None
        self._norms.clear()
        self._pool.reset()
        self._attention.begin(has_prefill)
        self._num_rows, self._num_kept = num_rows, num_kept

    def bind_logits(self, rows: range, stop_before: bool = False) -> None:
        """Which of the step's rows the next `logits` computes, as a range of `StepArrays.logit_rows`.

        ``stop_before``: it returns what it would have multiplied, so that the head gives hidden states.
        """
        self._logit_rows, self.stops_before_logits = rows, stop_before

    def embedding(self, name: str, scale: float = 1.0) -> DeviceArray:
        table = self._weights.embedding(name)
        out = self._pool.array((self._num_rows, table.shape[1]), table.dtype)
        embedding(
            self._library, self._arrays.token_ids[: self._num_rows], table, out,
            vocab_start=self._vocabulary.start, scale=scale,
        )  # fmt: skip
        return self._group.all_reduce(out)

    def position_embedding(self, x: DeviceArray, name: str) -> DeviceArray:
        x = self._overwritten(x)
        add_position_embedding(self._library, x, self._arrays.positions[: len(x)], self._weights.embedding(name))
        return x

    def rms_norm(self, x: DeviceArray, name: str, eps: float, weight_offset: float = 0.0) -> DeviceArray:
        return self.add_rms_norm(x, None, name, eps, weight_offset)[0]

    def layer_norm(self, x: DeviceArray, name: str, eps: float, weight_offset: float = 0.0) -> DeviceArray:
        return self.add_layer_norm(x, None, name, eps, weight_offset)[0]

    def add_rms_norm(
        self, x: DeviceArray, residual: DeviceArray | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[DeviceArray, DeviceArray]:
        """One kernel, which adds to ``residual`` in place."""
        x, residual = self._equally_long(x, residual)
        weight = self._weights.array(name)
        total = x if residual is None else self._overwritten(residual)

        def write(out: Any, x: DeviceArray, residual: DeviceArray | None) -> None:
            rms_norm(self._library, x, weight, out, epsilon=eps, weight_offset=weight_offset, residual=residual)

        out = self._deferred_norm(x, total, lambda out: write(out, x, residual), lambda out: write(out, total, None))
        return out, total

    def add_layer_norm(
        self, x: DeviceArray, residual: DeviceArray | None, name: str, eps: float, weight_offset: float = 0.0
    ) -> tuple[DeviceArray, DeviceArray]:
        """One kernel, which adds to ``residual`` in place."""
        x, residual = self._equally_long(x, residual)
        weight, bias = self._weights.norm(name)
        total = x if residual is None else self._overwritten(residual)

        def write(out: Any, x: DeviceArray, residual: DeviceArray | None) -> None:
            layer_norm(
                self._library, x, weight, bias, out, epsilon=eps, weight_offset=weight_offset, residual=residual
            )  # fmt: skip

        out = self._deferred_norm(x, total, lambda out: write(out, x, residual), lambda out: write(out, total, None))
        return out, total

    def column_linear(self, x: DeviceArray, name: str) -> DeviceArray:
        """Adds the bias in the product's epilogue. Products of codes, or of at most `MAX_GATED_TOKENS` tokens, wait for their consumer."""
        bias, weight = self._weights.linear(name).bias, self._matrices.matrix(name)
        if bias is not None or (len(x) > MAX_GATED_TOKENS and not isinstance(weight, QuantizedRows)):
            return self._product(x, name, bias)
        rows = self._operand(x, name, has_bias=False)

        def write(out: DeviceArray) -> None:
            self._multiply(rows, name, out, None)

        def write_gated(out: DeviceArray, kind: ActivationName) -> bool:
            return self._multiply_gated(rows, name, out, kind)

        self._pending = DeferredProduct(self._pool, (len(x), weight.shape[0]), x.dtype, write, write_gated)
        return self._pending

    def row_linear_partial(self, x: DeviceArray, name: str) -> DeviceArray:
        return self._product(x, name, None)

    def add_bias(self, x: DeviceArray, name: str) -> DeviceArray:
        x = self._overwritten(x)
        bias = self._weights.linear(name).bias
        if bias is not None:
            add_bias(self._library, x, bias)
        return x

    def all_reduce(self, x: DeviceArray) -> DeviceArray:
        return self._group.all_reduce(self._overwritten(x))

    def row_linear(self, x: DeviceArray, name: str) -> DeviceArray:
        """A single rank adds the bias in the product's epilogue."""
        if self._group.size == 1:
            return self._product(x, name, self._weights.linear(name).bias)
        return super().row_linear(x, name)

    def add(self, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        x, y = self._equally_long(x, y)
        out = self._pool.array(x.shape, x.dtype)
        add(self._library, x, y, out)
        return out

    def scale(self, x: DeviceArray, factor: float) -> DeviceArray:
        x = self._overwritten(x)
        scale_and_clip(self._library, x, factor=factor)
        return x

    def clip(self, x: DeviceArray, limit: float) -> DeviceArray:
        x = self._overwritten(x)
        scale_and_clip(self._library, x, limit=limit)
        return x

    def activation(self, x: DeviceArray, kind: Activation) -> DeviceArray:
        x = self.values(x)
        out = self._pool.array(x.shape, x.dtype)
        activation(self._library, x, out, _ACTIVATIONS[kind])
        return out

    def gated_activation(self, x: DeviceArray, kind: Activation) -> DeviceArray:
        if isinstance(x, DeferredProduct) and x is self._pending and (out := x.gated(_ACTIVATIONS[kind])) is not None:
            self._pending = None
            return out
        return self._gated(self.values(x), kind)

    def _gated(self, x: DeviceArray, kind: Activation) -> DeviceArray:
        def write(out: Any) -> None:
            gated_activation(self._library, x, out, _ACTIVATIONS[kind])

        return self._deferred(x, (len(x), x.shape[1] // 2), write, write, writes_groups=True)

    def experts(self, x: DeviceArray, name: str, spec: ExpertsSpec) -> DeviceArray:
        x = self.values(x)
        router = self._weights.array(f"{name}.router")
        gate_up, down = self._matrices.stack(f"{name}.gate_up"), self._matrices.stack(f"{name}.down")
        num_held = len(gate_up) // (2 * down.shape[1])
        held = local_experts(spec.num_experts, num_held, self._group.rank, self._group.size)
        routing = Routing(spec.num_experts, spec.top_k, spec.renormalise, held)
        rows = ExpertRows.allocate(self._pool.array, len(x), routing, x.dtype.itemsize)
        route(self._library, self._rounded(x, f"{name}.router"), router, self._row_marks(len(x)), routing, rows)
        num_pairs = len(x) * spec.top_k
        hidden = self._pool.array((num_pairs, down.shape[1]), x.dtype)
        grouped_product(
            self._library, self._rounded(x, f"{name}.gate_up"), gate_up, hidden, routing, rows, gathers=True,
            activation=_ACTIVATIONS[spec.activation],
        )  # fmt: skip
        products = self._pool.array((num_pairs, x.shape[1]), x.dtype)
        grouped_product(self._library, self._rounded(hidden, f"{name}.down"), down, products, routing, rows)
        out = self._pool.array(x.shape, x.dtype)
        combine(self._library, products, rows, out)
        return out

    def sigmoid_gate(self, x: DeviceArray, y: DeviceArray, name: str) -> DeviceArray:
        x, y = self._equally_long(x, y)
        x, y = self._overwritten(x), self.values(self._rounded(y, name))
        sigmoid_gate(self._library, x, y, self._weights.array(name))
        return x

    def attention(self, qkv: DeviceArray, name: str, layer: int, spec: AttentionSpec) -> DeviceArray:
        qkv = self._overwritten(qkv)
        if spec.head_norm is not None:
            heads = self._attention.local_heads(layer)
            head_norm(
                self._library, qkv, self._weights.array(f"{name}.query_norm"), self._weights.array(f"{name}.key_norm"),
                num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, epsilon=spec.head_norm.eps,
                weight_offset=spec.head_norm.weight_offset, is_layer_norm=spec.head_norm.kind == "layer",
                query_bias=self._weights.bias(f"{name}.query_norm"), key_bias=self._weights.bias(f"{name}.key_norm"),
            )  # fmt: skip
        out = self._attention(qkv, layer, spec)
        if layer == self._last_layer and self._num_kept:
            return self._gather(out, range(self._num_kept))
        return out

    def logits(self, x: DeviceArray, name: str, soft_cap: float = 0.0) -> DeviceArray:
        """Over the rows of `bind_logits`."""
        rows = self.logit_rows(x)
        if self.stops_before_logits:
            return rows
        logits = self._product(rows, name, self._weights.linear(name).bias)
        if soft_cap:
            cap_logits(self._library, logits, soft_cap)
        return logits

    def logit_rows(self, x: DeviceArray) -> DeviceArray:
        """The rows of ``x`` that `bind_logits` named; all of them where only these are left, as after the attention of the last layer."""
        return x if len(x) == self._num_kept else self._gather(self.values(x), self._logit_rows)

    @property
    def weights(self) -> Weights[DeviceArray]:
        """This rank's shard."""
        return self._weights

    def products_in_words(self, num_tokens: int, dtype: str) -> str:
        """How fp8 blocks are multiplied by ``num_tokens`` rows of ``dtype``; see `block_products_in_words`."""
        return block_products_in_words(self._gemm, self._weights, num_tokens, dtype)

    def values(self, x: Rows) -> DeviceArray:
        """Return ``x`` in the compute type, made now if it still waits for its consumer. Enqueues; does not wait."""
        self._settle(x)
        return x.values() if isinstance(x, Deferred | DeferredProduct) else x

    def empty(self, like: DeviceArray, width: int) -> DeviceArray:
        """An uninitialised ``[T, width]`` for the rest of the step, of the rows and type of ``like``."""
        return self._pool.array((len(like), width), like.dtype)

    def _product(self, x: DeviceArray, name: str, bias: DeviceArray | None) -> DeviceArray:
        rows = self._operand(x, name, bias is not None)
        out = self._pool.array((len(rows), self._matrices.matrix(name).shape[0]), x.dtype)
        self._multiply(rows, name, out, bias)
        return out[: len(x)] if len(rows) > len(x) else out

    def _operand(self, x: Rows, name: str, has_bias: bool) -> DeviceArray | QuantizedRows | QuantizedGroups:
        """``x`` in the form in which the matrix takes it; as codes of groups perhaps with more rows."""
        matrix = self._matrices.matrix(name)
        if isinstance(matrix, PackedWeight) and self._gemm.takes_groups(len(x), matrix, x.dtype.name, has_bias):
            return self._groups(x, name)
        x = self._rounded(x, name)
        return self._codes(x, self._matrices.code_rule(name)) if isinstance(matrix, QuantizedRows) else self.values(x)

    def _groups(self, x: Rows, name: str) -> QuantizedGroups:
        rule = self._matrices.input_rule(name)
        assert rule is not None, "blocks have inputs of codes"
        self._settle(x)
        if isinstance(x, Deferred) and x.writes_groups and not x.is_kept:
            return x.groups(rule.powers_of_two)
        plain = self.values(x)
        out = quantized_groups(self._pool, plain.shape, rule.powers_of_two)
        quantize_groups(self._library, plain, out)
        return out

    def _rounded(self, x: Rows, name: str) -> Rows:
        """``x`` as plain values that its factors and codes make of it, where the product takes such; else as it is."""
        factors, rule = self._matrices.factors(name), self._matrices.input_rule(name)
        if factors is None and rule is None:
            return x
        plain = self.values(x)
        out = self._pool.array(plain.shape, plain.dtype)
        round_inputs(self._library, plain, out, rule, factors)
        return out

    def _multiply(
        self, rows: DeviceArray | QuantizedRows | QuantizedGroups, name: str, out: DeviceArray, bias: DeviceArray | None
    ) -> None:
        num_bytes = self._matrices.scratch_bytes(name, out.dtype.itemsize)
        scratch = None if num_bytes is None else self._pool.array((num_bytes,), "uint8")
        self._gemm(rows, self._matrices.matrix(name), out, bias, scratch=scratch)

    def _multiply_gated(
        self, rows: DeviceArray | QuantizedRows, name: str, out: DeviceArray, kind: ActivationName
    ) -> bool:
        return self._gemm.gated(rows, self._matrices.matrix(name), out, kind)

    def _deferred_norm(self, like: DeviceArray, total: DeviceArray, write: Write, write_again: Write) -> Rows:
        out = self._deferred(like, like.shape, write, write_again, norm_takes_groups(like.shape[1]), total)
        if isinstance(out, Deferred):
            self._norms.add(out)
        return out

    def _deferred(
        self, like: DeviceArray, shape: tuple[int, int], write: Write, write_again: Write, writes_groups: bool,
        source: DeviceArray | None = None,
    ) -> Rows:  # fmt: skip
        """What ``write`` fills: at once, or with quantised weights when its consumer is known."""
        if not self._matrices.meet_codes:
            out = self._pool.array(shape, like.dtype)
            write(out)
            return out
        self._pending = Deferred(self._pool, shape, like.dtype, write, write_again, writes_groups, source)
        return self._pending

    def _settle(self, x: Rows) -> None:
        """Make what still waits, unless it is ``x``: kernels keep the program's order."""
        pending, self._pending = self._pending, None
        if pending is not None and pending is not x and pending.is_pending:
            pending.values()

    def _overwritten(self, x: Rows) -> DeviceArray:
        """``x`` in the compute type, for an operation that overwrites it: norms of it, still in use, are made before."""
        x = self.values(x)
        for norm in [norm for norm in self._norms if norm.source is x]:
            norm.keep()
        return x

    def _codes(self, x: Rows, rule: CodeRule) -> QuantizedRows:
        self._settle(x)
        if isinstance(x, Deferred) and not x.is_kept:
            return x.codes(rule)
        x = self.values(x)
        out = quantized_rows(self._pool, x.shape, rule)
        quantize_rows(self._library, x, out)
        return out

    def rows_of(self, x: DeviceArray, other: DeviceArray) -> DeviceArray:
        """``x`` with the rows that ``other`` has: those kept, where ``other`` was computed after the last attention."""
        return x if len(x) <= len(other) else self._gather(x, range(len(other)))

    def _equally_long(self, x: Rows, y: Rows | None) -> tuple[DeviceArray, DeviceArray | None]:
        """Both in the compute type, with the rows of the shorter one."""
        x = self.values(x)
        if y is None:
            return x, None
        y = self.values(y)
        return self.rows_of(x, y), self.rows_of(y, x)

    def _row_marks(self, num_rows: int) -> DeviceArray:
        """``[num_rows]``, negative at padding rows: of the whole step, or of the rows kept after the last attention."""
        arrays = self._arrays
        return (arrays.slot_mapping if num_rows == self._num_rows else arrays.logit_rows)[:num_rows]

    def _gather(self, x: DeviceArray, rows: range) -> DeviceArray:
        """The rows of ``x`` that some of the step's rows with logits are."""
        gathered = self._pool.array((len(rows), x.shape[1]), x.dtype)
        gather_rows(self._library, x, self._arrays.logit_rows[rows.start : rows.stop], gathered)
        return gathered
