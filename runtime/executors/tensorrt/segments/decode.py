# SPDX-License-Identifier: Apache-2.0
"""The decode pass of a model with its segments computed by engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.tensorrt.segments.program import (
    Program,
    RecordingOps,
    Segment,
    SegmentCall,
    Value,
    WeightShapes,
)
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.models.base import Pass
from phalanx.runtime.ops import Tensor

__all__ = ["Programs", "SegmentRunner", "SegmentedPass", "Surroundings", "record", "segmented"]


_Computed = TypeVar("_Computed", contravariant=True)


class Surroundings(Protocol[Tensor]):
    """What computes between segments: an executor's own operations, and where its tensors are."""

    @property
    def weights(self) -> Weights[Tensor]:
        """This rank's shard."""
        ...

    @property
    def stops_before_logits(self) -> bool:
        """Whether the head is to return the rows that its last product would take."""
        ...

    def logit_rows(self, x: Tensor) -> Tensor:
        """The rows of ``x`` that need logits."""
        ...

    def rows_of(self, x: Tensor, other: Tensor) -> Tensor:
        """``x`` with the rows that ``other`` has, where that went on with fewer."""
        ...

    def empty(self, like: Tensor, width: int) -> Tensor:
        """A tensor with as many rows as ``like``."""
        ...


class SegmentRunner(Protocol[_Computed]):
    """Engines of segments."""

    def run(
        self, call: SegmentCall, inputs: Sequence[_Computed], weights: Sequence[_Computed], outputs: Sequence[_Computed]
    ) -> None:
        """Compute ``outputs``. Within a step, calls that agree in segment and ``is_tail`` have as many rows.

        Enqueues on the current stream; does not wait.
        """
        ...


@dataclass(frozen=True, slots=True)
class Programs:
    """One rank's share of a model.

    Attributes:
        blocks: from the tokens, or what the previous stage handed over, to ``(x, residual)`` or ``(x,)``.
        head: from ``(x, residual)``, as ``blocks`` leaves them, to logits; None before the last stage.
        joined_head: from their sum to logits.
    """

    blocks: Program
    head: Program | None
    joined_head: Program | None

    @property
    def calls(self) -> tuple[SegmentCall, ...]:
        """Every call of a segment."""
        programs = (one for one in (self.blocks, self.head, self.joined_head) if one is not None)
        return tuple(step for program in programs for step in program.steps if isinstance(step, SegmentCall))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Every different segment."""
        return tuple(dict.fromkeys(call.segment for call in self.calls))


def record(decode: Pass[Any], config: ModelConfig, layers: range, shapes: WeightShapes, place: Topology) -> Programs:
    """Run the pass's functions over `RecordingOps`."""
    rank, size = place.tp_rank, place.layout.tp
    ops = RecordingOps(shapes, rank, size, () if place.is_first_stage else (config.hidden_size,))
    x, residual = decode.run(ops, config, layers, *ops.inputs)
    left = [x] if residual is None else [x, residual]
    blocks = ops.program(left)
    if not place.is_last_stage:
        return Programs(blocks, None, None)
    heads = [_record_head(decode, config, shapes, rank, size, [one.width for one in kept]) for kept in (left, [x])]
    return Programs(blocks, *heads)


def _record_head(
    decode: Pass[Any], config: ModelConfig, shapes: WeightShapes, rank: int, size: int, widths: Sequence[int]
) -> Program:
    ops = RecordingOps(shapes, rank, size, widths)
    residual = ops.inputs[1] if len(ops.inputs) > 1 else None
    logits: Value = decode.head(ops, config, ops.inputs[0], residual)
    return ops.program([logits])


@dataclass(frozen=True, kw_only=True)
class SegmentedPass(Pass[Any], Generic[Tensor]):
    """A pass whose functions are its programs; what it declares is the model's own.

    It takes the executor's operations as every pass does, which must also be `Surroundings`.
    """

    programs: Programs
    runner: SegmentRunner[Tensor]

    def run(self, ops: Any, config: Any, layers: range, x: Any = None) -> tuple[Any, Any]:
        outputs = list(_execute(self.programs.blocks, ops, self.runner, [] if x is None else [x]))
        return outputs[0], outputs[1] if len(outputs) > 1 else None


def segmented(decode: Pass[Any], programs: Programs, runner: SegmentRunner[Tensor]) -> SegmentedPass[Tensor]:
    """``decode`` with its functions replaced by ``programs``, whose segments ``runner`` computes."""

    def head(ops: Any, config: Any, x: Any, residual: Any) -> Any:
        program = programs.joined_head if residual is None else programs.head
        assert program is not None, "only the last stage has a head"
        (logits,) = _execute(program, ops, runner, [x] if residual is None else [x, residual])
        return logits

    declared = {field.name: getattr(decode, field.name) for field in fields(Pass)}
    return SegmentedPass(**{**declared, "head": head}, programs=programs, runner=runner)


def _execute(program: Program, ops: Any, runner: SegmentRunner[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The program's outputs, or one tensor of rows where ``ops`` stops before logits."""
    values: dict[int, Tensor] = dict(zip(program.inputs, inputs, strict=True))
    for step in program.steps:
        if isinstance(step, SegmentCall):
            _execute_segment(step, ops, runner, values)
            continue
        call = step.call
        operands = [values.pop(number) if number in step.last_uses else values[number] for number in call.inputs]
        named = (call.name,) if call.name else ()
        values[call.output] = getattr(ops, call.operation)(*operands, *named, *call.options)
        if call.operation == "logit_rows" and ops.stops_before_logits:
            yield values[call.output]
            return
    yield from (values[number] for number in program.outputs)


def _execute_segment(
    step: SegmentCall, ops: Surroundings[Tensor], runner: SegmentRunner[Tensor], values: dict[int, Tensor]
) -> None:
    operands = [values[number] for number in step.inputs]
    fewest = min(operands, key=len)  # type: ignore[arg-type]
    operands = [ops.rows_of(one, fewest) for one in operands]
    results = [ops.empty(fewest, value.width) for value in step.segment.outputs]
    runner.run(step, operands, [_array(ops.weights, name) for name in step.weights], results)
    values.update(zip(step.outputs, results, strict=True))
    for number in step.last_uses:
        del values[number]


def _array(weights: Weights[Tensor], full_name: str) -> Tensor:
    owner, _, kind = full_name.rpartition(".")
    bias = weights.linear(owner).bias
    return bias if kind == "bias" and bias is not None else weights.array(owner)
