# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: which module has which format.

Source: compressed-tensors ``quantization/{quant_args,quant_scheme,quant_config}.py`` and ``utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Unread
from phalanx.checkpoints.quantization.choosing import (
    KV_SCALES,
    WAY_OUT,
    block_sizes,
    compiled,
    fp8_blocks,
    groups_in_order,
    of_parts,
    refused,
)
from phalanx.checkpoints.quantization.encodings import PackedWords
from phalanx.checkpoints.quantization.fields import Section, flag, group_size, integer, names, table
from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored
from phalanx.checkpoints.quantization.row_codes import InputKind, RowCodes

__all__ = ["read_compressed_tensors"]


def read_compressed_tensors(section: Section) -> FormatPlan:
    """``config_groups`` with targets, and ``ignore``. Of several targets that match, names come before ``re:``, and both before classes."""
    sparsity = table(section, "sparsity_config")
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise refused(f"compressed-tensors sparsity format={sparsity.get('format')!r}", "use the dense checkpoint")
    if table(section, "transform_config").get("config_groups"):
        raise refused("compressed-tensors with transforms (transform_config)", "use a checkpoint without rotations")
    groups, scheme = table(section, "config_groups"), table(section, "kv_cache_scheme")
    if not groups and not scheme:
        raise refused("compressed-tensors without config_groups", "restore its config.json")
    formats = {
        target: _compressed_format(table(groups, name), section)
        for name in groups
        for target in names(table(groups, name), "targets") or ("Linear",)
    }
    by_rank = sorted(formats, key=lambda target: (target == "Linear", target.startswith("re:"), target))
    ignored = names(section, "ignore")
    _check_rules((*formats, *ignored))

    def choose(modules: Sequence[str]) -> Format:
        if _targets(ignored, modules):
            return DENSE
        return next((formats[one] for one in by_rank if one == "Linear" or _targets((one,), modules)), DENSE)

    if scheme and not _is_static_fp8(scheme):
        raise refused(f"kv_cache_scheme={scheme}", "use --kv-cache-dtype and a checkpoint without it")
    in_order = groups_in_order("weight_g_idx", formats.values(), "actorder", unset=-1)
    return FormatPlan(
        of_parts(choose), KV_SCALES if scheme else (), has_kv_scales=bool(scheme), unread=(_SHAPES, _ZERO_POINTS, *in_order),
        choose_by_names=partial(of_parts, choose),
    )  # fmt: skip


def _is_static_fp8(scheme: Section) -> bool:
    """Whether a cache has one scale for all keys (values) of a layer, or one for each head."""
    kind = scheme.get("num_bits"), scheme.get("type"), bool(scheme.get("dynamic"))
    is_known = scheme.get("strategy") in ("tensor", "attn_head", None)
    return kind == (8, "float", False) and is_known and flag(scheme, "symmetric", True)


def _arguments(group: Section, key: str) -> Section | None:
    """How one operand is quantised; None = not at all. Names in lower case, and ``strategy`` as its absence is understood."""
    found = table(group, key)
    if not found:
        return None
    size = found.get("group_size")
    implied = "tensor" if size is None else "group" if group_size(found) else "channel"
    given = {name: value for name, value in found.items() if value is not None}
    lower = {name: value.lower() for name, value in given.items() if isinstance(value, str)}
    return {"strategy": implied, **given, **lower}


def _compressed_format(group: Section, section: Section) -> Format:
    weights, inputs = _arguments(group, "weights"), _arguments(group, "input_activations")
    if weights is None:
        if inputs is None and not table(group, "output_activations"):
            return DENSE  # the preset UNQUANTIZED
        raise refused("compressed-tensors with quantised activations of plain weights", WAY_OUT)
    layout = group.get("format") or section.get("format") or ""
    bits, kind, strategy = integer(weights, "num_bits", 0), weights.get("type"), weights.get("strategy")
    is_symmetric = flag(weights, "symmetric", True)
    what = f"compressed-tensors format={layout!r} num_bits={bits} type={kind!r} strategy={strategy!r}"
    if table(group, "output_activations"):
        raise refused(f"{what} with quantised outputs (output_activations)", "use a checkpoint without them")
    if inputs is not None:
        _check_inputs(inputs, kind, what)
    if layout in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8:
        if kind == "float" and strategy == "block":
            rows, columns = _block_structure(weights)
            if inputs is not None:
                _check_groups(inputs, columns, what)
            return fp8_blocks("weight_scale", rows, columns, "plain" if inputs is None else "fp8 groups")
        if kind in ("float", "int") and strategy in ("tensor", "channel") and is_symmetric:
            return RowCodes(
                "fp8" if kind == "float" else "int8", scale_of="tensor" if strategy == "tensor" else "row",
                input=_input_kind(inputs, what),
            )  # fmt: skip
    is_packed = layout == "pack-quantized" and strategy in ("channel", "group")
    if is_packed and kind == "int" and bits in (4, 8) and inputs is None:
        half = 1 << (bits - 1)
        columns = 0 if strategy == "channel" else group_size(weights, default=0)
        order = weights.get("actorder")
        if order not in (*_ORDERED, *_IN_ORDER):
            raise refused(f"{what} actorder={order!r}", WAY_OUT)
        is_ordered = order in _ORDERED and columns > 0
        zero = "" if is_symmetric else "weight_zero_point"
        stored = Stored(
            "weight_packed", "weight_scale", zero,
            PackedWords(bits, axis=1, offset=half), PackedWords(bits, axis=0, offset=half) if zero else None,
            group_index="weight_g_idx" if is_ordered else "",
        )  # fmt: skip
        return GroupCodes(f"int{bits}", stored, columns)
    raise refused(what, WAY_OUT)


def _block_structure(weights: Section) -> tuple[int, int]:
    """Early releases wrote ``"128x128"``."""
    sizes = weights.get("block_structure") or (128, 128)
    if isinstance(sizes, str):
        sizes = [int(size) if size.isdecimal() else size for size in sizes.split("x")]
    return block_sizes(sizes, "block_structure", "compressed-tensors")


_SHAPES = Unread(
    r".*\.weight_shape", "the sizes of a matrix", lambda tensor, extents: not extents or tensor.tolist() == [*extents]
)
"""Sizes without the padding of the last words."""
_ZERO_POINTS = Unread(
    r".*\.(weight|input|output|k|v)_zero_point", "unpacked zeros, as symmetric=true says",
    lambda tensor, _: tensor.dtype != "int32" and not tensor.any(),
)  # fmt: skip
"""Zero points of symmetric codes, which later releases leave out; packed words of zeros would mean the smallest code."""
_ORDERED = ("group", "dynamic", True)
"""``actorder`` of columns that name their groups."""
_IN_ORDER = ("weight", "static", False, None)
"""``actorder`` of columns that are in order when they are stored, whatever it was while they were quantised."""


def _check_rules(rules: Sequence[str]) -> None:
    """Refuse expressions that cannot be compiled, and classes of modules, of which files say nothing, other than the usual one."""
    for rule in rules:
        compiled(rule.removeprefix("re:") if rule.startswith("re:") else "", f"compressed-tensors rule {rule!r}")
        if rule[0].isupper() and rule.isidentifier() and rule != "Linear":
            raise refused(f"compressed-tensors rule {rule!r}, a class of modules,", "name the modules, or Linear")


def _check_inputs(inputs: Section, kind: Any, what: str) -> None:
    """Refuse inputs that are not symmetric codes of 8 bits of the weights' type."""
    if not flag(inputs, "symmetric", True):
        raise refused(f"{what} with asymmetric activations", "use a checkpoint with symmetric ones")
    if inputs.get("num_bits") != 8:
        raise refused(f"{what} with activations of {inputs.get('num_bits')} bits", WAY_OUT)
    if inputs.get("type") != kind:
        raise refused(f"{what} with activations type={inputs.get('type')!r}", WAY_OUT)


def _input_kind(inputs: Section | None, what: str) -> InputKind:
    if inputs is None:
        return "plain"
    dynamic, strategy = inputs.get("dynamic"), inputs.get("strategy")
    if dynamic is True and strategy == "token":
        return "tokens"
    if dynamic is False and strategy == "tensor":
        return "static"
    raise refused(f"{what} with activations strategy={strategy!r} dynamic={dynamic}", WAY_OUT)


def _check_groups(inputs: Section, columns: int, what: str) -> None:
    found = inputs.get("strategy"), inputs.get("group_size"), inputs.get("dynamic")
    if found != ("group", columns, True):
        raise refused(
            f"{what} with activations strategy={found[0]!r} group_size={found[1]} dynamic={found[2]}", WAY_OUT
        )


def _targets(names: Sequence[str], modules: Sequence[str]) -> bool:
    """Whether compressed-tensors' ``names`` (exact, or ``re:`` and an expression matched from the start) have one of ``modules``."""
    return any(
        re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
        for name in map(str, names)
        for module in modules
    )
