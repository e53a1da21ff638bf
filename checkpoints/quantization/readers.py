"""What ``quantization_config`` says: which module has which format, for each method that is loaded.

Sources: compressed-tensors ``quantization/{quant_args,quant_scheme,quant_config}.py`` and ``utils/match.py``; transformers
``quantizers/quantizer_{finegrained_fp8,fbgemm_fp8,awq,gptq}.py``; ModelOpt ``torch/export/convert_hf_config.py``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan
from phalanx.checkpoints.quantization.encodings import AWQ_ORDER, PackedWords
from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError

__all__ = ["READERS"]

Section = Mapping[str, Any]
Chooser = Callable[[str], Format]
"""Format of a module, by its name in the checkpoint."""

KV_SCALES = (r".*\.(k_scale|v_scale|kv_scale)", r".*\.[kv]_proj\.output_scale")
_WAY_OUT = "use the unquantised checkpoint, or one in compressed-tensors fp8, int8, w8a16 or w4a16"


def read_compressed_tensors(section: Section) -> FormatPlan:
    """``config_groups`` with targets, and ``ignore``."""
    sparsity = section.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise _refused(f"compressed-tensors sparsity format={sparsity.get('format')!r}", "use the dense checkpoint")
    if not section.get("config_groups"):
        raise _refused("compressed-tensors without config_groups", "restore its config.json")
    groups = [
        (tuple(group.get("targets") or ("Linear",)), _compressed_format(group, section))
        for group in (section.get("config_groups") or {}).values()
    ]
    ignored = tuple(section.get("ignore") or ())

    def choose(module: str) -> Format:
        if _targets(ignored, module):
            return DENSE
        return next((chosen for targets, chosen in groups if "Linear" in targets or _targets(targets, module)), DENSE)

    scheme = section.get("kv_cache_scheme")
    if scheme and (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
        raise _refused(f"kv_cache_scheme={scheme}", "use --kv-cache-dtype and a checkpoint without it")
    ignored_tensors = (r".*\.weight_shape", *(KV_SCALES if scheme else ()))
    return FormatPlan(_of_parts(choose), ignored_tensors, has_kv_scales=bool(scheme))


def _compressed_format(group: Section, section: Section) -> Format:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    layout = group.get("format") or section.get("format") or ""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    what = f"compressed-tensors format={layout!r} num_bits={bits} type={kind!r} strategy={strategy!r}"
    if weights.get("actorder") == "group":
        raise _refused(f"{what} actorder='group'", "use a checkpoint without activation order")
    if layout in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8:
        if kind == "float" and strategy == "block":
            rows, columns = weights.get("block_structure") or (128, 128)
            return _fp8_blocks("weight_scale", int(rows), int(columns), plain=inputs is None)
        if strategy in ("tensor", "channel") and weights.get("symmetric", True):
            return RowCodes(
                "fp8" if kind == "float" else "int8", scale_of="tensor" if strategy == "tensor" else "row",
                input=_input_kind(inputs, what),
            )  # fmt: skip
    if layout == "pack-quantized" and kind == "int" and bits in (4, 8) and inputs is None:
        half = 1 << (bits - 1)
        columns = 0 if strategy == "channel" else int(weights.get("group_size") or 0)
        zero = "" if weights.get("symmetric", True) else "weight_zero_point"
        stored = Stored(
            "weight_packed", "weight_scale", zero,
            PackedWords(bits, axis=1, offset=half), PackedWords(bits, axis=0, offset=half) if zero else None,
        )  # fmt: skip
        return GroupCodes(f"int{bits}", stored, columns)
    raise _refused(what, _WAY_OUT)


def _input_kind(inputs: Section | None, what: str) -> Any:
    if inputs is None:
        return "plain"
    if not inputs.get("symmetric", True):
        raise _refused(f"{what} with asymmetric activations", "use a checkpoint with symmetric ones")
    if inputs.get("num_bits") != 8:
        raise _refused(f"{what} with activations of {inputs.get('num_bits')} bits", _WAY_OUT)
    return "tokens" if inputs.get("dynamic") else "static"


def _fp8_blocks(scale: str, rows: int, columns: int, plain: bool = False) -> Format:
    stored = Stored("weight", scale, dtype="F8_E4M3", block_rows=rows)
    return GroupCodes("fp8 blocks", stored, columns, input="plain" if plain else "fp8 groups")


def read_fp8(section: Section) -> FormatPlan:
    """Hugging Face ``fp8`` (DeepSeek's blocks) and vLLM's of the same name (a scale for each tensor)."""
    block = section.get("weight_block_size")
    if not block and section.get("activation_scheme") is None:  # blocks of 128 in transformers, an error in vLLM
        raise _refused("fp8 without activation_scheme and weight_block_size", "write the one by which it was quantised")
    scheme = str(section.get("activation_scheme") or "dynamic")
    if block:
        if scheme != "dynamic":
            raise _refused(f"fp8 with blocks and activation_scheme={scheme!r}", _WAY_OUT)
        chosen: Format = _fp8_blocks("weight_scale_inv", int(block[0]), int(block[1]))
    else:
        if scheme not in ("dynamic", "static"):
            raise _refused(f"fp8 with activation_scheme={scheme!r}", _WAY_OUT)
        chosen = RowCodes("fp8", scale_of="tensor", input="tokens" if scheme == "dynamic" else "static")
    return _excluding(chosen, section)


def read_fbgemm_fp8(section: Section) -> FormatPlan:
    """A scale for each row and token; ``activation_scale_ub`` bounds the latter."""
    ceiling = float(section.get("activation_scale_ub") or 1200.0)
    return _excluding(RowCodes("fp8", input_ceiling=ceiling), section)


def read_awq(section: Section) -> FormatPlan:
    """AutoAWQ, ``version: gemm``."""
    version, bits = str(section.get("version", "gemm")).lower(), section.get("bits", section.get("w_bit"))
    group = int(section.get("group_size", section.get("q_group_size", 128)))
    if version != "gemm" or bits != 4 or not section.get("zero_point", True):
        raise _refused(
            f"awq version={version!r} bits={bits} zero_point={section.get('zero_point')}", "use version gemm, 4 bits"
        )
    words = PackedWords(4, axis=0, offset=8, order=AWQ_ORDER)
    stored = Stored("qweight", "scales", "qzeros", words, words, transposed=True)
    return _excluding(GroupCodes("int4", stored, max(group, 0)), section)


def read_gptq(section: Section) -> FormatPlan:
    """GPTQ v1 (zero points less one) and v2, 4 and 8 bits; with activation order (``desc_act``) each column names its group."""
    bits, group = section.get("bits"), int(section.get("group_size", 128))
    form = str(section.get("checkpoint_format") or section.get("format") or "gptq")
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        raise _refused(f"gptq bits={bits} checkpoint_format={form!r}", "use 4 or 8 bits in format gptq or gptq_v2")
    if section.get("dynamic"):
        raise _refused("gptq with rules per module (dynamic)", "use a checkpoint with one scheme")
    half = 1 << (bits - 1)
    stored = Stored(
        "qweight", "scales", "qzeros", PackedWords(bits, axis=1, offset=half),
        PackedWords(bits, axis=0, offset=half, added=int(form == "gptq")), transposed=True,
        group_index="g_idx" if section.get("desc_act") and group > 0 else "",
    )  # fmt: skip
    plan = _excluding(GroupCodes(f"int{bits}", stored, max(group, 0)), {**section, "ignore": ["lm_head"]})
    return FormatPlan(plan.choose, (r".*\.g_idx",))


def read_modelopt(section: Section) -> FormatPlan:
    """ModelOpt's FP8: static per tensor, or per channel and token."""
    quantization = section.get("quantization") or section
    algorithm = str(quantization.get("quant_algo"))
    formats: dict[str, Format] = {
        "FP8": RowCodes("fp8", scale_of="tensor", input="static"),
        "FP8_PER_CHANNEL_PER_TOKEN": RowCodes("fp8"),
    }
    if algorithm not in formats:
        raise _refused(f"modelopt quant_algo={algorithm!r}", _WAY_OUT)
    excluded = tuple(quantization.get("exclude_modules") or quantization.get("ignore") or ())
    kv = quantization.get("kv_cache_quant_algo") or (quantization.get("kv_cache_scheme") or {}).get("type")
    if kv not in (None, "FP8", "float"):
        raise _refused(f"modelopt kv_cache_quant_algo={kv!r}", "use a checkpoint with an fp8 cache or none")

    def choose(module: str) -> Format:
        return DENSE if any(fnmatch.fnmatch(module, pattern) for pattern in excluded) else formats[algorithm]

    return FormatPlan(_of_parts(choose), KV_SCALES if kv else (), has_kv_scales=bool(kv))


READERS: Mapping[str, Callable[[Section], FormatPlan]] = MappingProxyType(
    {
        "compressed-tensors": read_compressed_tensors,
        "fp8": read_fp8,
        "fbgemm_fp8": read_fbgemm_fp8,
        "awq": read_awq,
        "gptq": read_gptq,
        "modelopt": read_modelopt,
    }
)
"""Readers by ``quant_method``."""


def _excluding(chosen: Format, section: Section) -> FormatPlan:
    """``chosen`` for every module whose path contains none of the excluded names."""
    names = ("modules_to_not_convert", "ignored_layers", "ignore")
    excluded = tuple(str(name) for key in names for name in section.get(key) or ())
    if not excluded:
        excluded = ("lm_head",)
    return FormatPlan(_of_parts(lambda module: DENSE if any(name in module for name in excluded) else chosen))


def _of_parts(choose: Chooser) -> Callable[[WeightSpec], Format]:
    """A weight's format by the modules of its parts, which must agree. Tables of embeddings are dense."""

    def of_weight(spec: WeightSpec) -> Format:
        if not (spec.owner.startswith("layers.") or spec.owner == "lm_head") or spec.owner.endswith("norm"):
            return DENSE
        modules = [part.source.removesuffix(".weight") for part in spec.parts]
        if any("embed" in module or "wte" in module for module in modules):
            return DENSE  # a head that is tied to the table
        formats = {choose(module) for module in modules}
        if len(formats) > 1:
            raise ConfigError(
                f"quantization_config gives {' and '.join(sorted(one.name for one in formats))} to {', '.join(modules)}, which are "
                "computed as one product; use a checkpoint with one scheme for them"
            )
        (chosen,) = formats
        return chosen.for_weight(spec) if isinstance(chosen, GroupCodes) else chosen

    return of_weight


def _targets(names: Sequence[str], module: str) -> bool:
    """Whether compressed-tensors' ``names`` (exact, or ``re:`` and an expression matched from the start) have the module."""
    return any(
        re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
        for name in map(str, names)
    )


def _refused(what: str, way_out: str) -> ConfigError:
    return ConfigError(f"quantization_config in config.json: {what} cannot be loaded; {way_out}")
