# SPDX-License-Identifier: Apache-2.0
"""What ``quantization_config`` says: which module has which format, for each method that is loaded.

Sources: transformers ``quantizers/quantizer_{finegrained_fp8,fbgemm_fp8,awq,gptq}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Unread
from phalanx.checkpoints.quantization.choosing import (
    HEAD,
    KV_SCALES,
    WAY_OUT,
    block_sizes,
    excluding,
    fp8_blocks,
    groups_in_order,
    of_parts,
    refused,
)
from phalanx.checkpoints.quantization.compressed_tensors import read_compressed_tensors
from phalanx.checkpoints.quantization.encodings import AWQ_ORDER, PackedWords
from phalanx.checkpoints.quantization.fields import Section, flag, group_size, integer, listed_names, number, table
from phalanx.checkpoints.quantization.group_codes import GroupCodes, InputScales, Stored
from phalanx.checkpoints.quantization.modelopt import read_modelopt
from phalanx.checkpoints.quantization.row_codes import RowCodes

__all__ = ["READERS"]


def read_fp8(section: Section) -> FormatPlan:
    """Hugging Face ``fp8`` (DeepSeek's blocks) and vLLM's of the same name (a scale for each tensor)."""
    sizes = section.get("weight_block_size")
    block = None if sizes is None else block_sizes(sizes, "weight_block_size", "fp8 with")
    if not block and section.get("activation_scheme") is None:  # blocks of 128 in transformers, an error in vLLM
        raise refused("fp8 without activation_scheme and weight_block_size", "write the one by which it was quantised")
    scheme = str(section.get("activation_scheme") or "dynamic")
    if block:
        if scheme != "dynamic":
            raise refused(f"fp8 with blocks and activation_scheme={scheme!r}", WAY_OUT)
        chosen: GroupCodes | RowCodes = fp8_blocks("weight_scale_inv", *block, _input_scales(section))
    else:
        if scheme not in ("dynamic", "static"):
            raise refused(f"fp8 with activation_scheme={scheme!r}", WAY_OUT)
        chosen = RowCodes("fp8", scale_of="tensor", input="tokens" if scheme == "dynamic" else "static")
    plan, kv = excluding(chosen, section), section.get("kv_cache_scheme")
    if kv not in (None, "static"):
        raise refused(f"fp8 with kv_cache_scheme={kv!r}", WAY_OUT)
    return replace(plan, ignored_tensors=KV_SCALES, has_kv_scales=True) if kv else plan  # AutoFP8


def _input_scales(section: Section) -> InputScales:
    """DeepSeek-V3.1 was trained with powers of two, weights and inputs."""
    kinds: dict[str, InputScales] = {"float": "fp8 groups", "ue8m0": "fp8 groups by powers of two"}
    kind = str(section.get("scale_fmt") or "float").lower()
    if kind not in kinds:
        raise refused(f"fp8 with scale_fmt={kind!r}", WAY_OUT)
    return kinds[kind]


def read_fbgemm_fp8(section: Section) -> FormatPlan:
    """A scale for each row and token; ``activation_scale_ub`` bounds the latter."""
    ceiling = number(section, "activation_scale_ub", 1200.0)
    bound = Unread(
        r".*\.input_scale_ub", f"activation_scale_ub={ceiling:g}", lambda tensor, _: bool((tensor == ceiling).all())
    )
    return replace(excluding(RowCodes("fp8", input_ceiling=ceiling), section), unread=(bound,))


def read_awq(section: Section) -> FormatPlan:
    """AutoAWQ, ``version: gemm``. The head is plain whatever ``modules_to_not_convert`` lists, as AutoAWQ and transformers have it.

    Without ``zero_point`` files hold zero points all the same, all in the middle (AutoRound's symmetric ones).
    """
    version = _named("gemm", section, "version", "checkpoint_format", "format")
    bits = integer(section, "bits", integer(section, "w_bit", 0))
    group = group_size(section, default=group_size(section, "q_group_size"))
    flag(section, "zero_point", True)  # only checked to be a flag: zero points are stored either way
    if version != "gemm" or bits != 4:
        raise refused(f"awq version={version!r} bits={bits}", "use version gemm, 4 bits")
    if section.get("dynamic"):
        raise refused("awq with rules per module (dynamic)", "use a checkpoint with one scheme")
    words = PackedWords(4, axis=0, offset=8, order=AWQ_ORDER)
    stored = Stored("qweight", "scales", "qzeros", words, words, transposed=True)
    return excluding(GroupCodes("int4", stored, group), section, always=(HEAD,))


def _named(usual: str, section: Section, *keys: str) -> str:
    """What quantisers wrote under one or several of ``keys``, which mean the same; several names only if they differ."""
    found = {str(one).lower() for key in keys if (one := section.get(key)) is not None}
    return " and ".join(sorted(found)) or usual


def read_gptq(section: Section) -> FormatPlan:
    """GPTQ v1 (zero points less one) and v2, 4 and 8 bits; with activation order (``desc_act``) each column names its group.

    ``lm_head`` and ``modules_in_block_to_quantize`` say which modules are quantised. Of these, ``dynamic`` has rules by expressions: ``-:``
    leaves modules as they are, others change fields; the first that matches decides.
    """
    chosen, rules = _gptq_format(section), [*_gptq_rules(section)]
    included = listed_names(section, "modules_in_block_to_quantize")
    has_head = flag(section, "lm_head", False)

    def choose(modules: Sequence[str]) -> Format:
        is_included = not included or any(module.endswith(included) for module in modules)
        if not (has_head if HEAD in modules else is_included):
            return DENSE
        return next((one for pattern, one in rules if any(pattern.match(module) for module in modules)), chosen)

    formats = [one for one in (chosen, *(one for _, one in rules)) if isinstance(one, GroupCodes)]
    unread = (_EXTRA_BIASES, *groups_in_order("g_idx", formats, "desc_act=false"))
    return FormatPlan(of_parts(choose), unread=unread, choose_by_names=partial(of_parts, choose))


def _gptq_format(section: Section) -> GroupCodes:
    bits, group = integer(section, "bits", 0), group_size(section)
    form = _named("gptq", section, "checkpoint_format", "format")
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        raise refused(f"gptq bits={bits} checkpoint_format={form!r}", "use 4 or 8 bits in format gptq or gptq_v2")
    if flag(section, "is_marlin_format", False):
        raise refused("gptq is_marlin_format=true", "use a checkpoint in format gptq or gptq_v2")
    half, is_ordered = 1 << (bits - 1), flag(section, "desc_act", False) and group > 0
    zeros = PackedWords(bits, axis=0, offset=half, added=int(form == "gptq"), is_middle=flag(section, "sym", False))
    stored = Stored(
        "qweight", "scales", "qzeros", PackedWords(bits, axis=1, offset=half), zeros, transposed=True,
        group_index="g_idx" if is_ordered else "",
    )  # fmt: skip
    return GroupCodes(f"int{bits}", stored, group)


def _gptq_rules(section: Section) -> Iterator[tuple[re.Pattern[str], Format]]:
    rules = table(section, "dynamic")
    for rule in rules:
        expression = rule.removeprefix("-:").removeprefix("+:")
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise refused(f"gptq rule {rule!r} ({error})", "correct the expression") from None
        yield pattern, DENSE if rule.startswith("-:") else _gptq_format({**section, **table(rules, rule)})


_EXTRA_BIASES = Unread(r".*\.bias", "zeros", lambda tensor, _: not tensor.any())
"""AutoGPTQ gave every matrix a bias."""


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
