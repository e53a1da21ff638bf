# SPDX-License-Identifier: Apache-2.0
"""What ``quantization_config`` says: which module has which format, for each method that is loaded.

Sources: transformers ``quantizers/quantizer_{finegrained_fp8,fbgemm_fp8}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from phalanx.checkpoints.formats import FormatPlan, Unread
from phalanx.checkpoints.quantization.auto_round import read_auto_round
from phalanx.checkpoints.quantization.choosing import (
    KV_SCALES,
    WAY_OUT,
    block_sizes,
    excluding,
    fp8_blocks,
    refused,
)
from phalanx.checkpoints.quantization.compressed_tensors import read_compressed_tensors
from phalanx.checkpoints.quantization.fields import Section, number
from phalanx.checkpoints.quantization.gptq_awq import read_awq, read_gptq
from phalanx.checkpoints.quantization.group_codes import GroupCodes, InputScales
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


READERS: Mapping[str, Callable[[Section], FormatPlan]] = MappingProxyType(
    {
        "compressed-tensors": read_compressed_tensors,
        "fp8": read_fp8,
        "fbgemm_fp8": read_fbgemm_fp8,
        "awq": read_awq,
        "gptq": read_gptq,
        "auto-round": read_auto_round,
        "intel/auto-round": read_auto_round,
        "modelopt": read_modelopt,
    }
)
"""Readers by ``quant_method``."""
