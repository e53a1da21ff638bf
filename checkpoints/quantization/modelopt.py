# SPDX-License-Identifier: Apache-2.0
"""ModelOpt: one algorithm for all modules but those that are excluded, or one for each module (``MIXED_PRECISION``).

Source: ModelOpt ``torch/export/{convert_hf_config,quant_utils}.py``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan
from phalanx.checkpoints.quantization.choosing import (
    KV_SCALES,
    WAY_OUT,
    Chooser,
    fp8_blocks,
    of_parts,
    refused,
)
from phalanx.checkpoints.quantization.encodings import NibbleRows
from phalanx.checkpoints.quantization.fields import Section, flag, group_size, names
from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored
from phalanx.checkpoints.quantization.prescale import has_prescale, with_prescale
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.spec import WeightSpec

__all__ = ["read_modelopt"]

_FACTORS = "pre_quant_scale"
_SMOOTHQUANT = RowCodes("int8", input="static")


def read_modelopt(section: Section) -> FormatPlan:
    """FP8 (static by tensor, by channel and token, blocks of weights), int8 with SmoothQuant, 8-bit weights, 4-bit weights by AWQ."""
    nested = section.get("quantization")
    fields: Section = {**section, **nested} if isinstance(nested, dict) else section
    is_mixed = _algorithm(fields) == "MIXED_PRECISION"
    of_module = _of_each_layer(fields) if is_mixed else _of_all_but_excluded(fields)
    kv = fields.get("kv_cache_quant_algo") or fields.get("kv_cache_scheme")
    if isinstance(kv, dict) and (kv.get("type"), kv.get("num_bits"), bool(kv.get("dynamic"))) == ("float", 8, False):
        kv = "FP8"
    if kv not in (None, "FP8"):
        raise refused(f"modelopt kv_cache_quant_algo={kv!r}", "use a checkpoint with an fp8 cache or none")
    usual = of_parts(of_module)

    def choose_by_names(stored: Collection[str]) -> Callable[[WeightSpec], Format]:
        choose = of_parts(of_module, stored)

        def is_scaled(spec: WeightSpec) -> bool:
            return _may_be_scaled(choose(spec)) and has_prescale(spec, _FACTORS, stored, in_all_layers=not is_mixed)

        return with_prescale(choose, _FACTORS, is_scaled)

    return FormatPlan(
        with_prescale(usual, _FACTORS, lambda spec: _is_usually_scaled(spec, usual(spec))),
        KV_SCALES if kv else (), has_kv_scales=bool(kv), choose_by_names=choose_by_names,
    )  # fmt: skip


def _of_all_but_excluded(fields: Section) -> Chooser:
    chosen = _format(fields, "")
    excluded = _excluded(fields)
    return lambda modules: DENSE if _matches(excluded, modules) else chosen


def _of_each_layer(fields: Section) -> Chooser:
    """By ``quantized_layers``: a module's entry, or that of the module that it is in (``mlp.experts``); the others stay as they are."""
    layers, excluded = fields.get("quantized_layers"), _excluded(fields)
    if not isinstance(layers, dict) or not layers:
        raise refused(
            "modelopt quant_algo='MIXED_PRECISION' without quantized_layers", f"restore its config.json, or {WAY_OUT}"
        )
    formats: dict[str, Format] = {str(name): _of_layer(str(name), entry, fields) for name, entry in layers.items()}

    def choose(modules: Sequence[str]) -> Format:
        if _matches(excluded, modules):
            return DENSE
        found = [name for name in formats for module in modules if module == name or module.startswith(f"{name}.")]
        return formats[max(found, key=len)] if found else DENSE

    return choose


def _of_layer(name: str, entry: Any, fields: Section) -> Format:
    own: Mapping[str, Any] = entry if isinstance(entry, dict) else {"quant_algo": entry}
    if own.get("quant_algo") is None:
        return DENSE
    common = {key: value for key, value in fields.items() if key == "group_size"}
    return _format({**common, **own}, f" of {name} (quantized_layers)")


def _excluded(fields: Section) -> tuple[str, ...]:
    return names(fields, "exclude_modules") or names(fields, "ignore")


def _matches(patterns: Sequence[str], modules: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(module, pattern) for pattern in patterns for module in modules)


def _algorithm(fields: Section) -> str:
    return str(fields.get("quant_algo")).upper()  # the exporter writes fp8_pb_wo, and the others like FP8


def _format(fields: Section, where: str) -> Format:
    formats: dict[str, Format] = {
        "FP8": RowCodes("fp8", scale_of="tensor", input="static"),
        "FP8_PER_CHANNEL_PER_TOKEN": RowCodes("fp8"),
        "FP8_PB_WO": fp8_blocks("weight_scale", 128, 128, "plain"),
        "W8A8_SQ_PER_CHANNEL": _SMOOTHQUANT,
        "W8A16": RowCodes("int8", input="plain"),
    }
    algorithm = _algorithm(fields)
    if algorithm in formats:
        return formats[algorithm]
    if algorithm != "W4A16_AWQ":
        raise refused(f"modelopt quant_algo={fields.get('quant_algo')!r}{where}", WAY_OUT)
    if flag(fields, "has_zero_point", False):
        raise refused(f"modelopt quant_algo='W4A16_AWQ'{where} with zero points", WAY_OUT)
    stored = Stored("weight", "weight_scale", codes_encoding=NibbleRows())
    return GroupCodes("int4", stored, group_size(fields) or 128)


def _may_be_scaled(chosen: Format) -> bool:
    return chosen == _SMOOTHQUANT or (isinstance(chosen, GroupCodes) and chosen.kind == "int4")


def _is_usually_scaled(spec: WeightSpec, chosen: Format) -> bool:
    """Whether its inputs have factors as a rule: with AWQ those that do not come from a norm, into which they are folded."""
    is_by_columns = any(part.shard is not None and part.shard.axis == 1 for part in spec.parts)
    return _may_be_scaled(chosen) and (chosen == _SMOOTHQUANT or is_by_columns)
