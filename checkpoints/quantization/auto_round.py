# SPDX-License-Identifier: Apache-2.0
"""What ``quantization_config`` says of AutoRound's own format, whose tensors are GPTQ's or AWQ's.

Sources: AutoRound 0.16.1 ``export/export_to_autoround/export.py`` (who packs which ``packing_format``), ``inference/convert_model.py``
(which modules), ``inference/backend.py`` (zero points less one or not); vLLM ``quantization/auto_round.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan
from phalanx.checkpoints.quantization.choosing import (
    HEAD,
    WAY_OUT,
    Chooser,
    compiled,
    groups_in_order,
    of_parts,
    refused,
)
from phalanx.checkpoints.quantization.fields import Section, integer, listed_names, table
from phalanx.checkpoints.quantization.gptq_awq import EXTRA_BIASES, awq_format, gptq_format
from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.spec import find_stored

__all__ = ["read_auto_round"]

_GPTQ, _GPTQ_V2, _AWQ = "gptq", "gptq_v2", "awq"
_LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "auto_round:auto_gptq": _GPTQ, "auto_round:gptq": _GPTQ, "auto_round:gptq:exllamav2": _GPTQ,
        "auto_round": _GPTQ_V2, "auto_round:gptqmodel": _GPTQ_V2,
        "auto_round:auto_awq": _AWQ, "auto_round:awq": _AWQ,
    }
)  # fmt: skip
"""By ``packing_format``, which the first releases called ``backend``."""
_DEFAULT = "auto_round:auto_gptq"
_OTHERWISE = (
    "modules_to_not_convert", "rotation_config", "spinquant_config", "static_attention_dtype", "static_kv_dtype", "super_bits",
)  # fmt: skip
"""Fields that would change what is computed."""
_EXPRESSION = re.compile(r"[*+?^$()\[\]{}|\\]")
_PLAIN_BITS = 16


def read_auto_round(section: Section) -> FormatPlan:
    """GPTQ's layout, with zero points less one or as they are, or AWQ's.

    ``extra_config`` has rules for modules by name, which come first, and by expression, of which the first that is found in the name
    counts. Other modules of the blocks in ``block_name_to_quantize`` are quantised; of those elsewhere what is stored decides, as
    classes may call blocks otherwise than the file. The head is plain unless it is named: AutoRound's expressions are for blocks.
    """
    layout = _layout(section)
    usual, rules = _format(section, layout), table(section, "extra_config")
    named = {name: _format({**section, **_given(table(rules, name))}, layout) for name in rules}
    expressions = [
        (compiled(name, f"auto-round rule {name!r}"), chosen)
        for name, chosen in named.items()
        if _EXPRESSION.search(name)
    ]
    blocks = _blocks(section)

    def chooser(stored: Collection[str]) -> Chooser:
        def choose(modules: Sequence[str]) -> Format:
            if exact := next((module for module in modules if module in named), ""):
                return named[exact]
            if HEAD in modules:
                return DENSE
            for pattern, chosen in expressions:
                if any(map(pattern.search, modules)):
                    return chosen
            is_elsewhere = bool(stored and blocks) and not any(module.startswith(blocks) for module in modules)
            if is_elsewhere and find_stored([f"{module}.qweight" for module in modules], stored) is None:
                return DENSE
            return usual

        return choose

    formats = [one for one in (usual, *named.values()) if isinstance(one, GroupCodes)]
    unread = () if layout == _AWQ else (EXTRA_BIASES, *groups_in_order("g_idx", formats, "auto-round"))
    return FormatPlan(
        of_parts(chooser(())), unread=unread, choose_by_names=lambda stored: of_parts(chooser(stored), stored)
    )


def _layout(section: Section) -> str:
    backend = str(section.get("backend") or "")
    packing = str(section.get("packing_format") or (backend if backend.startswith("auto_round") else _DEFAULT))
    if packing not in _LAYOUTS:
        raise refused(f"auto-round packing_format={packing!r}", f"use one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[packing]


def _given(section: Section) -> Section:
    return {key: value for key, value in section.items() if value is not None}


def _format(section: Section, layout: str) -> Format:
    """Of a module with these fields."""
    if field := next((field for field in _OTHERWISE if section.get(field)), ""):
        raise refused(f"auto-round with {field}={str(section[field])[:40]}", WAY_OUT)
    if integer(section, "act_bits", _PLAIN_BITS) < _PLAIN_BITS:
        raise refused(f"auto-round act_bits={section['act_bits']}", WAY_OUT)
    if integer(section, "bits", 0) >= _PLAIN_BITS:
        return DENSE
    if (kind := section.get("data_type") or "int") != "int":
        raise refused(f"auto-round data_type={kind!r}", WAY_OUT)
    if layout == _AWQ:
        return awq_format(section)
    return gptq_format({"sym": True, **_given(section), "desc_act": False, "checkpoint_format": layout})


def _blocks(section: Section) -> tuple[str, ...]:
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        value = section.get(key)
        if value is not None:
            names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
            return listed_names({key: names}, key)
    return ()
