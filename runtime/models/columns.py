# SPDX-License-Identifier: Apache-2.0
"""How the columns of a split tensor are divided over ranks: what a product leaves, and what the next operation takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from phalanx.checkpoints.spec import Part
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard, Span, expert_shard
from phalanx.runtime.attention import AttentionSpec, HeadNorm

__all__ = [
    "Run",
    "check_experts",
    "check_head_norm",
    "check_heads",
    "check_inputs",
    "difference",
    "half",
    "head_runs",
    "runs_of",
]

_SIZES = range(2, 17)
"""Numbers of tensor-parallel ranks at which divisions are compared."""


@dataclass(frozen=True, slots=True)
class Run:
    """``extent`` columns that ranks divide as one axis by ``shard``."""

    extent: int
    shard: Shard


def runs_of(parts: Iterable[Part], axis: int) -> tuple[Run, ...]:
    """What ranks divide of a weight's ``axis``, in order; pieces of one axis that follow one another are one run."""
    return _joined(tuple((part.shape[axis], part.shard) for part in parts if part.shard is not None))


@lru_cache(maxsize=256)
def head_runs(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Run, Run, Run]:
    """Queries, keys and values as attention takes them."""
    queries = Shard(0, unit=head_dim, groups=num_kv_heads)
    keys = Run(num_kv_heads * head_dim, replace(queries, copy=True))
    return Run(num_heads * head_dim, queries), keys, keys


def difference(runs: Sequence[Run], wanted: Sequence[Run]) -> str:
    """Where ``runs`` are divided otherwise than ``wanted``, in words; empty = nowhere."""
    if [run.extent for run in runs] != [run.extent for run in wanted]:
        return f"{_columns(wanted)} against {_columns(runs)}"
    sizes = (_first_difference(one, other) for one, other in zip(runs, wanted, strict=True))
    first = min((size for size in sizes if size), default=0)
    return f"from tp_size={first} on" if first else ""


def half(width: int, runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """What is left of gate and up, side by side in ``width`` columns, once one has multiplied the other.

    Raises:
        ConfigError: a rank would hold other columns of one than of the other.
    """
    middle = len(runs) // 2
    where = "being one part" if len(runs) == 1 else difference(runs[:middle], runs[middle:])
    if where:
        raise ConfigError(
            f"gated_activation takes gate and up as two parts that ranks divide alike, which these {width} columns are not, {where}; "
            "declare them with declarations.gate_up or stacked_gate_up"
        )
    return runs[:middle]


def check_inputs(name: str, parts: Sequence[Part], runs: Sequence[Run]) -> None:
    """Check that a matrix takes the columns that a rank holds of a tensor divided by ``runs``.

    Raises:
        ConfigError: it is divided otherwise.
    """
    for part in parts:
        if where := difference(runs_of([part], 1), runs):
            raise ConfigError(
                f"{name} divides its inputs over ranks otherwise than the tensor's columns are divided, {where}; declare both alike "
                "(head_shard for heads, feed_forward_shard)"
            )


def check_heads(name: str, runs: Sequence[Run], spec: AttentionSpec) -> None:
    """Check that a rank holds the queries, keys and values of its heads.

    Raises:
        ConfigError: it holds others.
    """
    wanted = head_runs(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    if where := difference(runs, wanted if spec.keys == "own" else wanted[:1]):
        raise ConfigError(
            f"{name} takes queries, keys and values as parts that ranks divide by heads, but these are divided otherwise, {where}; "
            "declare them with declarations.qkv, stacked_qkv or fused_qkv"
        )


def check_head_norm(name: str, parts: Sequence[Part], spec: AttentionSpec, norm: HeadNorm, *, of_queries: bool) -> None:
    """Check that weights of each head lie with their heads, those of all heads on every rank.

    Raises:
        ConfigError: they lie elsewhere.
    """
    queries, keys, _ = head_runs(spec.num_heads, spec.num_kv_heads, spec.head_dim // math.prod(parts[0].shape[1:]))
    wanted = (queries if of_queries else keys,) if norm.own_weights else ()
    if where := difference(runs_of(parts, 0), wanted):
        way = "head_shard or kv_head_shard" if norm.own_weights else "no shard"
        raise ConfigError(f"{name} is not divided over ranks as its heads are, {where}; declare it with {way}")


def check_experts(name: str, gate_up: Sequence[Part], down: Sequence[Part], num_experts: int) -> None:
    """Check that gate, up and down of each expert lie apart, and that ranks divide the three alike or own them.

    Raises:
        ConfigError: naming the first expert for which it is not so.
    """
    if (len(gate_up), len(down)) != (2 * num_experts, num_experts):
        raise ConfigError(
            f"{name} takes gate and up, and down, of {num_experts} experts as {2 * num_experts} and {num_experts} parts, but "
            f"{len(gate_up)} and {len(down)} are declared; use declarations.experts"
        )
    for number in range(num_experts):
        gate, up, out = ((part.shape, part.shard) for part in (*gate_up[2 * number : 2 * number + 2], down[number]))
        if not _stay_together(gate, up, out, number, num_experts):
            raise ConfigError(
                f"gate, up and down of expert {number} of {name} are not divided over ranks alike; use declarations.experts"
            )


_Divided = tuple[tuple[int, ...], Shard | None]
"""Shape of a part, and how it is divided."""


@lru_cache(maxsize=4096)
def _stay_together(gate: _Divided, up: _Divided, down: _Divided, number: int, num_experts: int) -> bool:
    """Whether one rank holds all of an expert (`phalanx.parallel.sharding.expert_shard`), or each the same columns of all three."""
    parts, axes = [Part("", *each) for each in (gate, up, down)], (0, 0, 1)
    if all(part.shard == expert_shard(part.shape[0], number, num_experts) for part in parts):
        return True
    if any(part.shard is None or part.shard.axis != axis for part, axis in zip(parts, axes, strict=True)):
        return False
    columns = [runs_of([part], axis) for part, axis in zip(parts, axes, strict=True)]
    return not any(difference(columns[0], others) for others in columns[1:])


def _columns(runs: Sequence[Run]) -> str:
    return " + ".join(str(run.extent) for run in runs) + " columns" if runs else "none"


@lru_cache(maxsize=256)
def _joined(pieces: tuple[tuple[int, Shard], ...]) -> tuple[Run, ...]:
    runs, done = [], 0
    for extent, shard in pieces:
        kind, units = replace(shard, axis=0, start=0, what=""), extent // shard.unit
        if not shard.whole:
            runs.append(Run(extent, kind))
            continue
        done = done + units if shard.start == done else 0
        if done == shard.whole:
            runs.append(Run(done * shard.unit, replace(kind, whole=0)))
            done = 0
    return tuple(runs)


@lru_cache(maxsize=4096)
def _first_difference(one: Run, other: Run) -> int:
    """The first number of ranks whose shares differ; 0 = none. A number that either cannot serve is refused elsewhere."""
    for size in _SIZES:
        shares, others = _shares(one, size), _shares(other, size)
        if shares and others and shares != others:
            return size
    return 0


def _shares(run: Run, size: int) -> list[Span]:
    try:
        return [run.shard.span(run.extent, rank, size) for rank in range(size)]
    except ConfigError:
        return []
