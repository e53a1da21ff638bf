# SPDX-License-Identifier: Apache-2.0
"""What ``quantization_config`` says of AutoAWQ's and GPTQ's packed words.

Sources: transformers ``quantizers/quantizer_{awq,gptq}.py``, AutoAWQ, AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Unread
from phalanx.checkpoints.quantization.choosing import HEAD, compiled, excluding, groups_in_order, of_parts, refused
from phalanx.checkpoints.quantization.encodings import AWQ_ORDER, PackedWords
from phalanx.checkpoints.quantization.fields import Section, flag, group_size, integer, listed_names, table
from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored

__all__ = ["EXTRA_BIASES", "awq_format", "gptq_format", "read_awq", "read_gptq"]


def read_awq(section: Section) -> FormatPlan:
    """AutoAWQ, ``version: gemm``. The head is plain whatever ``modules_to_not_convert`` lists, as AutoAWQ and transformers have it.

    Without ``zero_point`` files hold zero points all the same, all in the middle (AutoRound's symmetric ones).
    """
    if section.get("dynamic"):
        raise refused("awq with rules per module (dynamic)", "use a checkpoint with one scheme")
    return excluding(awq_format(section), section, always=(HEAD,))


def awq_format(section: Section) -> GroupCodes:
    """Of a module with these fields."""
    version = _named("gemm", section, "version", "checkpoint_format", "format")
    bits = integer(section, "bits", integer(section, "w_bit", 0))
    group = group_size(section, default=group_size(section, "q_group_size"))
    flag(section, "zero_point", True)  # only checked to be a flag: zero points are stored either way
    if version != "gemm" or bits != 4:
        raise refused(f"awq version={version!r} bits={bits}", "use version gemm, 4 bits")
    words = PackedWords(4, axis=0, offset=8, order=AWQ_ORDER)
    stored = Stored("qweight", "scales", "qzeros", words, words, transposed=True)
    return GroupCodes("int4", stored, group)


def _named(usual: str, section: Section, *keys: str) -> str:
    """What quantisers wrote under one or several of ``keys``, which mean the same; several names only if they differ."""
    found = {str(one).lower() for key in keys if (one := section.get(key)) is not None}
    return " and ".join(sorted(found)) or usual


def read_gptq(section: Section) -> FormatPlan:
    """GPTQ v1 (zero points less one) and v2, 4 and 8 bits; with activation order (``desc_act``) each column names its group.

    ``lm_head`` and ``modules_in_block_to_quantize`` say which modules are quantised. Of these, ``dynamic`` has rules by expressions: ``-:``
    leaves modules as they are, others change fields; the first that matches decides.
    """
    chosen, rules = gptq_format(section), [*_gptq_rules(section)]
    included = listed_names(section, "modules_in_block_to_quantize")
    has_head = flag(section, "lm_head", False)

    def choose(modules: Sequence[str]) -> Format:
        is_included = not included or any(module.endswith(included) for module in modules)
        if not (has_head if HEAD in modules else is_included):
            return DENSE
        return next((one for pattern, one in rules if any(pattern.match(module) for module in modules)), chosen)

    formats = [one for one in (chosen, *(one for _, one in rules)) if isinstance(one, GroupCodes)]
    unread = (EXTRA_BIASES, *groups_in_order("g_idx", formats, "desc_act=false"))
    return FormatPlan(of_parts(choose), unread=unread, choose_by_names=partial(of_parts, choose))


def gptq_format(section: Section) -> GroupCodes:
    """Of a module with these fields."""
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
        pattern = compiled(rule.removeprefix("-:").removeprefix("+:"), f"gptq rule {rule!r}")
        yield pattern, DENSE if rule.startswith("-:") else gptq_format({**section, **table(rules, rule)})


EXTRA_BIASES = Unread(r".*\.bias", "zeros", lambda tensor, _: not tensor.any())
"""AutoGPTQ gave every matrix a bias."""
