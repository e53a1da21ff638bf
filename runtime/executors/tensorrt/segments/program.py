# SPDX-License-Identifier: Apache-2.0
"""A model's functions as a program: segments, which TensorRT computes, and the calls between them, which it cannot.

The functions run once over `RecordingOps`, which only notes what they ask for. A call that reads the step or the cache or
crosses ranks (embeddings, attention, experts, sums, the choice of rows) stands alone; what lies between two of them is a
segment. Values are numbered in a segment, and so are its weights, which are inputs like any other tensor: all layers of a kind
are then one `Segment`, built once, and the engine holds no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.runtime.attention import AttentionSpec, LocalHeads
from phalanx.runtime.config import Activation
from phalanx.runtime.ops import ExpertsSpec, Ops

__all__ = ["Between", "Call", "Program", "RecordingOps", "Segment", "SegmentCall", "Value", "WeightShapes"]

WeightShapes = Mapping[str, tuple[int, ...]]
"""This rank's shapes by full name: ``layers.3.qkv.weight``."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor ``[T, width]`` of a recording."""

    number: int
    width: int


@dataclass(frozen=True, slots=True)
class Call:
    """One operation.

    Attributes:
        operation: a method of `TrtLayers` or, between segments, of the executor's own operations.
        inputs, output: numbers of values.
        name: of its weights; empty if it has none.
        options: what else it is called with, in order.
    """

    operation: str
    inputs: tuple[int, ...]
    output: int
    name: str = ""
    options: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """What one engine computes. Equal segments are one engine.

    Attributes:
        widths: of the inputs, which are values 0, 1, ...
        weights: shapes by the names in ``calls``: ``0.weight``.
        calls: in order; each gives the next value, or a weight's bias may be absent.
        outputs: values, with their widths.
    """

    widths: tuple[int, ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class SegmentCall:
    """A segment with the program's values and weights that it is called with.

    Attributes:
        weights: full names, in the order of `Segment.weights`.
        last_uses: values that nothing needs afterwards.
        is_tail: after the program's last attention, from where on a step may go on with fewer rows.
    """

    segment: Segment
    inputs: tuple[int, ...]
    weights: tuple[str, ...]
    outputs: tuple[int, ...]
    last_uses: tuple[int, ...]
    is_tail: bool


@dataclass(frozen=True, slots=True)
class Between:
    """A call between segments; ``last_uses`` as in `SegmentCall`."""

    call: Call
    last_uses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """Steps from ``inputs`` to ``outputs``, which are values."""

    inputs: tuple[int, ...]
    steps: tuple[SegmentCall | Between, ...]
    outputs: tuple[int, ...]

    @property
    def segments(self) -> Iterator[Segment]:
        """Each segment as often as it is called."""
        return (step.segment for step in self.steps if isinstance(step, SegmentCall))


_BETWEEN = frozenset({"embedding", "position_embedding", "attention", "experts", "all_reduce", "logit_rows"})


class RecordingOps(Ops[Value]):
    """Notes the operations of one rank; `program` divides them.

    Args:
        shapes: this rank's weights.
        rank, num_ranks: place in the tensor-parallel group; alone, a rank has no sums.
        widths: of the tensors that the recorded function is given.
    """

    def __init__(self, shapes: WeightShapes, rank: int, num_ranks: int, widths: Sequence[int] = ()) -> None:
        self._shapes, self._rank, self._num_ranks = shapes, rank, num_ranks
        self._values: list[Value] = []
        self._calls: list[Call] = []
        self.inputs = tuple(self._value(width) for width in widths)

    def program(self, outputs: Sequence[Value]) -> Program:
        """What was recorded, up to ``outputs``."""
        parts = list(_parts(self._calls))
        steps = tuple(self._step(part, parts[index + 1 :], outputs) for index, part in enumerate(parts))
        return Program(tuple(one.number for one in self.inputs), steps, tuple(one.number for one in outputs))

    # Between segments

    def embedding(self, name: str, scale: float = 1.0) -> Value:
        return self._call("embedding", (), self._shapes[f"{name}.weight"][1], name, scale)

    def position_embedding(self, x: Value, name: str) -> Value:
        return self._call("position_embedding", (x,), x.width, name)

    def attention(self, qkv: Value, name: str, layer: int, spec: AttentionSpec) -> Value:
        heads = LocalHeads.of(spec, self._rank, self._num_ranks)
        return self._call("attention", (qkv,), heads.num_heads * heads.head_dim, name, layer, spec)

    def experts(self, x: Value, name: str, spec: ExpertsSpec) -> Value:
        return self._call("experts", (x,), x.width, name, spec)

    def all_reduce(self, x: Value) -> Value:
        return x if self._num_ranks == 1 else self._call("all_reduce", (x,), x.width)

    # In segments

    def rms_norm(self, x: Value, name: str, eps: float, weight_offset: float = 0.0) -> Value:
        return self._call("rms_norm", (x,), x.width, name, eps, weight_offset)

    def layer_norm(self, x: Value, name: str, eps: float, weight_offset: float = 0.0) -> Value:
        return self._call("layer_norm", (x,), x.width, name, eps, weight_offset)

    def column_linear(self, x: Value, name: str) -> Value:
        return self._call("column_linear", (x,), self._shapes[f"{name}.weight"][0], name)

    def row_linear_partial(self, x: Value, name: str) -> Value:
        return self._call("row_linear_partial", (x,), self._shapes[f"{name}.weight"][0], name)

    def add_bias(self, x: Value, name: str) -> Value:
        return self._call("add_bias", (x,), x.width, name) if f"{name}.bias" in self._shapes else x

    def add(self, x: Value, y: Value) -> Value:
        return self._call("add", (x, y), x.width)

    def scale(self, x: Value, factor: float) -> Value:
        return self._call("scale", (x,), x.width, "", factor)

    def clip(self, x: Value, limit: float) -> Value:
        return self._call("clip", (x,), x.width, "", limit)

    def sigmoid_gate(self, x: Value, y: Value, name: str) -> Value:
        return self._call("sigmoid_gate", (x, y), x.width, name)

    def activation(self, x: Value, kind: Activation) -> Value:
        return self._call("activation", (x,), x.width, "", kind)

    def gated_activation(self, x: Value, kind: Activation) -> Value:
        return self._call("gated_activation", (x,), x.width // 2, "", kind)

    def logits(self, x: Value, name: str, soft_cap: float = 0.0) -> Value:
        rows = self._call("logit_rows", (x,), x.width)
        return self._call("logits", (rows,), self._shapes[f"{name}.weight"][0], name, soft_cap)

    # Recording and dividing

    def _value(self, width: int) -> Value:
        self._values.append(Value(len(self._values), width))
        return self._values[-1]

    def _call(self, operation: str, inputs: tuple[Value, ...], width: int, name: str = "", *options: Any) -> Value:
        output = self._value(width)
        numbers = tuple(one.number for one in inputs)
        self._calls.append(Call(operation, numbers, output.number, name, options))
        return output

    def _step(
        self, part: Sequence[Call], later: Sequence[Sequence[Call]], outputs: Sequence[Value]
    ) -> SegmentCall | Between:
        needed = {number for calls in later for call in calls for number in call.inputs}
        needed |= {one.number for one in outputs}
        made = [call.output for call in part]
        taken = dict.fromkeys(number for call in part for number in call.inputs if number not in made)
        last_uses = tuple(number for number in taken if number not in needed)
        if part[0].operation in _BETWEEN:
            return Between(part[0], last_uses)
        kept = tuple(number for number in made if number in needed)
        segment, weights = self._segment(part, tuple(taken), kept)
        is_tail = not any(calls[0].operation == "attention" for calls in later)
        return SegmentCall(segment, tuple(taken), weights, kept, last_uses, is_tail)

    def _segment(
        self, part: Sequence[Call], taken: tuple[int, ...], kept: tuple[int, ...]
    ) -> tuple[Segment, tuple[str, ...]]:
        """The calls with values and weights numbered anew, and the weights' names."""
        numbers = {number: index for index, number in enumerate((*taken, *(call.output for call in part)))}
        owners = {name: str(index) for index, name in enumerate(dict.fromkeys(call.name for call in part if call.name))}
        calls = tuple(
            Call(call.operation, tuple(numbers[one] for one in call.inputs), numbers[call.output],
                 owners.get(call.name, ""), call.options)
            for call in part
        )  # fmt: skip
        used = [name for owner in owners for kind in _KINDS if (name := f"{owner}.{kind}") in self._used(part, owner)]
        weights = tuple(
            (f"{owners[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}", self._shapes[name]) for name in used
        )
        widths = tuple(self._values[number].width for number in taken)
        outputs = tuple(Value(numbers[number], self._values[number].width) for number in kept)
        return Segment(widths, weights, calls, outputs), tuple(used)

    def _used(self, part: Sequence[Call], owner: str) -> set[str]:
        """Full names of the weights of ``owner`` that the calls multiply with or add."""
        kinds = {kind for call in part if call.name == owner for kind in _KINDS_OF.get(call.operation, _KINDS)}
        return {name for kind in kinds if (name := f"{owner}.{kind}") in self._shapes}


_KINDS = ("weight", "bias")
_KINDS_OF = {"row_linear_partial": ("weight",), "sigmoid_gate": ("weight",), "add_bias": ("bias",)}


def _parts(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls between segments one by one, those in segments together."""
    part: list[Call] = []
    for call in calls:
        if call.operation in _BETWEEN:
            if part:
                yield part
            yield [call]
            part = []
        else:
            part.append(call)
    if part:
        yield part
