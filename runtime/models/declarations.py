# SPDX-License-Identifier: Apache-2.0
"""Weight declarations that families share: how common parts are named, stacked and split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard, expert_shard
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import feed_forward_shard, head_shard, kv_head_shard

__all__ = [
    "ExpertNames",
    "also_without",
    "column_linear",
    "experts",
    "fused_qkv",
    "gate_up",
    "norm",
    "own_head_norms",
    "qkv",
    "renamed",
    "row_linear",
    "stacked_gate_up",
    "stacked_qkv",
]


def norm(name: str, source: str, size: int, bias: bool = False) -> list[WeightSpec]:
    """Weight, and with ``bias`` bias, of a norm over ``size``; the same on every rank."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [WeightSpec(f"{name}.{kind}", (Part(f"{source}.{kind}", (size,)),)) for kind in kinds]


def own_head_norms(config: ModelConfig, name: str, source: str) -> list[WeightSpec]:
    """Norms of query and key heads that each have their own weights, ``[H, C]`` and ``[K, C]``, split with the heads."""
    return [
        WeightSpec(f"{name}.{ours}.weight", (Part(f"{source}.{theirs}.weight", (heads, config.head_dim), shard),))
        for ours, theirs, heads, shard in (
            ("query_norm", "q_norm", config.num_heads, replace(head_shard(config, 0), unit=1)),
            ("key_norm", "k_norm", config.num_kv_heads, replace(kv_head_shard(config), unit=1)),
        )
    ]


def column_linear(name: str, source: str, shape: tuple[int, int], shard: Shard, bias: bool = False) -> list[WeightSpec]:
    """A matrix ``[out, in]`` split by outputs, its bias with it."""
    specs = [WeightSpec(f"{name}.weight", (Part(f"{source}.weight", shape, shard),))]
    return specs + ([WeightSpec(f"{name}.bias", (Part(f"{source}.bias", shape[:1], shard),))] if bias else [])


def row_linear(name: str, source: str, shape: tuple[int, int], shard: Shard, bias: bool = False) -> list[WeightSpec]:
    """A matrix ``[out, in]`` split by inputs; its bias, added after the sum, is whole on every rank."""
    specs = [WeightSpec(f"{name}.weight", (Part(f"{source}.weight", shape, shard),))]
    return specs + ([WeightSpec(f"{name}.bias", (Part(f"{source}.bias", shape[:1]),))] if bias else [])


def qkv(config: ModelConfig, name: str, sources: tuple[str, str, str], bias: bool = False) -> list[WeightSpec]:
    """Separate q, k, v matrices of a checkpoint as one matrix (and bias): ``[(H + 2K) C, D]``."""

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        layout = zip(sources, _qkv_rows(config), _qkv_shards(config), strict=True)
        return tuple(Part(f"{source}.{kind}", (rows, *tail), shard) for source, rows, shard in layout)

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def fused_qkv(config: ModelConfig, name: str, source: str, bias: bool = False) -> list[WeightSpec]:
    """One matrix (and bias) that keeps the rows of each key/value head together, ``[K, H / K + 2, C]`` with the group's
    queries, then its key, then its value (GPT-NeoX, BLOOM), as ours: ``[(H + 2K) C, D]``, a part for each piece."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    group = heads // kv_heads

    def pieces(kind: str, first: int, count: int, shard: Shard, tail: tuple[int, ...]) -> Iterator[Part]:
        for number in range(kv_heads):
            yield Part(
                f"{source}.{kind}", (count * dim, *tail), _piece(shard, number * count, kv_heads * count),
                first_row=(number * (group + 2) + first) * dim, source_rows=(heads + 2 * kv_heads) * dim,
            )  # fmt: skip

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        queries, keys = head_shard(config, 0), kv_head_shard(config)
        rows = ((0, group, queries), (group, 1, keys), (group + 1, 1, keys))
        return tuple(part for first, count, shard in rows for part in pieces(kind, first, count, shard, tail))

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def stacked_qkv(config: ModelConfig, name: str, source: str, bias: bool = False) -> list[WeightSpec]:
    """One matrix (and bias) of a checkpoint with the rows of all queries, then keys, then values: ``[(H + 2K) C, D]``."""
    sizes = _qkv_rows(config)
    starts = (0, sizes[0], sizes[0] + sizes[1])

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        layout = zip(sizes, starts, _qkv_shards(config), strict=True)
        return tuple(
            Part(f"{source}.{kind}", (rows, *tail), shard, first_row=start, source_rows=sum(sizes))
            for rows, start, shard in layout
        )

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def gate_up(config: ModelConfig, name: str, sources: tuple[str, str], bias: bool = False) -> list[WeightSpec]:
    """Gate and up matrices as one (and bias): ``[2F, D]``, gate first."""
    shard = feed_forward_shard(config, 0)

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        return tuple(Part(f"{source}.{kind}", (config.intermediate_size, *tail), shard) for source in sources)

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


def stacked_gate_up(config: ModelConfig, name: str, source: str, bias: bool = False) -> list[WeightSpec]:
    """One matrix (and bias) of a checkpoint with the rows of the gate, then of up: ``[2F, D]``."""
    size, shard = config.intermediate_size, feed_forward_shard(config, 0)

    def parts(kind: str, *tail: int) -> tuple[Part, ...]:
        return tuple(
            Part(f"{source}.{kind}", (size, *tail), shard, first_row=start, source_rows=2 * size) for start in (0, size)
        )

    specs = [WeightSpec(f"{name}.weight", parts("weight", config.hidden_size))]
    return specs + ([WeightSpec(f"{name}.bias", parts("bias"))] if bias else [])


class ExpertNames(NamedTuple):
    """The modules of a mixture: its router, its experts, each below ``<experts>.<number>``, and gate, up and down of one."""

    router: str
    experts: str
    matrices: tuple[str, str, str]

    def matrix(self, number: int, kind: int) -> str:
        """Of an expert."""
        return f"{self.experts}.{number}.{self.matrices[kind]}.weight"


def experts(
    config: ModelConfig, name: str, router: str, source: str, names: tuple[str, str, str], num_experts: int,
    others: tuple[ExpertNames, ...] = (),
) -> list[WeightSpec]:  # fmt: skip
    """Router, and each expert's matrices one below the other, as `phalanx.runtime.ops.Ops.experts` takes them.

    Every rank holds a share of each expert's F columns, or with ``config.expert_parallel`` some experts whole. ``names``: gate,
    up and down below ``<source>.<number>``. ``others``: what other files, or the classes that wrote them, call the modules.
    """
    d, f = config.hidden_size, config.intermediate_size
    all_names = (ExpertNames(router, source, names), *others)
    gate, up, down = range(3)

    def parts(shape: tuple[int, int], shared_axis: int, *kinds: int) -> tuple[Part, ...]:
        shared = feed_forward_shard(config, shared_axis)
        result = []
        for number in range(num_experts):
            shard = expert_shard(shape[0], number, num_experts) if config.expert_parallel else shared
            for kind in kinds:
                first, *aliases = (each.matrix(number, kind) for each in all_names)
                result.append(Part(first, shape, shard, tuple(aliases)))
        return tuple(result)

    first, *aliases = dict.fromkeys(f"{each.router}.weight" for each in all_names)
    return [
        WeightSpec(f"{name}.router.weight", (Part(first, (num_experts, d), aliases=tuple(aliases)),)),
        WeightSpec(f"{name}.gate_up.weight", parts((f, d), 0, gate, up)),
        WeightSpec(f"{name}.down.weight", parts((d, f), 1, down)),
    ]


def renamed(specs: list[WeightSpec], old: str, new: str, *others: str) -> list[WeightSpec]:
    """The same weights under names that begin with ``new``, or else with one of ``others``, where theirs begin with ``old``."""

    def part(part: Part) -> Part:
        if not part.source.startswith(old):
            return part
        rest = part.source.removeprefix(old)
        aliases = (*(f"{other}{rest}" for other in others), *part.aliases)
        return replace(part, source=f"{new}{rest}", aliases=aliases)

    return [replace(spec, parts=tuple(map(part, spec.parts))) for spec in specs]


def also_without(prefix: str, specs: list[WeightSpec]) -> list[WeightSpec]:
    """The same weights, found under names without ``prefix``, too, as files of the base model have them."""

    def renamed(part: Part) -> Part:
        if not part.source.startswith(prefix):
            return part
        return replace(part, aliases=(*part.aliases, part.source.removeprefix(prefix)))

    return [replace(spec, parts=tuple(map(renamed, spec.parts))) for spec in specs]


@lru_cache(maxsize=2048)
def _piece(shard: Shard, start: int, whole: int) -> Shard:
    """The same division of a piece; models with many heads ask for each piece once a layer."""
    return replace(shard, start=start, whole=whole)


def _qkv_rows(config: ModelConfig) -> tuple[int, int, int]:
    keys = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, keys, keys


def _qkv_shards(config: ModelConfig) -> tuple[Shard, Shard, Shard]:
    return head_shard(config, 0), kv_head_shard(config), kv_head_shard(config)
