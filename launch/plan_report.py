# SPDX-License-Identifier: Apache-2.0
"""What ``launch.plan`` prints for people: memory of each rank, layouts next to each other, and why one is best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phalanx.launch.layouts import Estimate

__all__ = ["comparison", "reason", "table"]

_MIB = 1 << 20
_GIB = 1 << 30


def comparison(optimise: str, found: Sequence[Estimate]) -> str:
    """Return the layouts that were compared, best first, as a table with a reason under it."""
    header = f"{'dp':>4} {'pp':>4} {'tp':>4} {'tokens/s':>10} {'ms/token':>9} {'sequences':>10}  from"
    lines = [
        f"{each.dp:>4} {each.pp:>4} {each.tp:>4} "
        + (
            each.problem
            or f"{each.tokens_per_second:>10,.0f} {each.token_seconds * 1e3:>9.2f} {each.num_seqs:>10}  {each.source}"
        )
        for each in found
    ]
    return "\n".join([header, *lines, reason(optimise, found)])


def reason(optimise: str, found: Sequence[Estimate]) -> str:
    """Return in one line which layout to use and why."""
    best, others = found[0], [each for each in found[1:] if not each.problem]
    if best.problem:
        return "no layout fits; use more --ranks, larger GPUs, or a smaller --max-model-len"
    flags = f"use --dp {best.dp} --pp {best.pp} --tp {best.tp}"
    if not others:
        return f"{flags}: it is the only layout that fits"
    second = others[0]
    if optimise == "throughput":
        gain, cause = best.tokens_per_second / second.tokens_per_second, _why_more_tokens(best, second)
    else:
        gain, cause = second.token_seconds / best.token_seconds, _why_sooner(best, second)
    return f"{flags}: {cause}; {gain:.2f} times as good as the next, dp {second.dp} x pp {second.pp} x tp {second.tp}"


def _why_more_tokens(best: Estimate, second: Estimate) -> str:
    """What the better layout has that the second lacks. Both use all ranks, so fewer replicas are larger ones."""
    if best.dp > second.dp:
        return "replicas work without waiting for each other"
    if best.dp < second.dp and best.num_seqs > second.num_seqs:
        return (
            f"larger replicas leave more room for sequences, {best.num_seqs} at once each instead of {second.num_seqs}"
        )
    if best.dp < second.dp:
        return "GPUs that share a replica read their weights for all of its sequences at once"
    if best.tp < second.tp:
        return "handing over between stages costs less than sums within each layer"
    return "every GPU works on every step, so none waits for a slower stage"


def _why_sooner(best: Estimate, second: Estimate) -> str:
    if best.tp > second.tp:
        return "each GPU reads a share of every layer's weights"
    if best.tp < second.tp:
        return "sums between GPUs cost more than they save"
    return "a token passes through fewer stages"


def table(result: dict[str, Any]) -> str:
    """Return what `phalanx.launch.plan.plan` found as a table, a row for each rank, with a verdict under it."""
    parts = list(result["ranks"][0]["weights"])
    header = ["rank", "layers", *parts, "weights", "workspace", "comm", "KV/block"]
    rows = [
        [str(rank["rank"]), "{}-{}".format(rank["layers"][0], rank["layers"][1] - 1)]
        + [_mib(rank["weights"][part]) for part in parts]
        + [_mib(rank[key]) for key in ("weight_bytes", "workspace_bytes", "communication_bytes")]
        + [f"{rank['kv_block_bytes'] / 1024:.0f} KiB"]
        for rank in result["ranks"]
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    layout = f"dp {result['dp']} x pp {result['pp']} x tp {result['tp']}"
    return "\n".join(
        [
            f"{result['model']}, {result['dtype']}, {layout} = {result['num_gpus']} GPU(s); sizes in MiB",
            *lines,
            result["quantisation"],
            _verdict(result),
        ]
    )


def _verdict(result: dict[str, Any]) -> str:
    needs = (
        f"one sequence of {result['max_model_len']} tokens needs GPUs of {result['smallest_gpu_bytes'] / _GIB:.1f} GiB"
    )
    if result["fits"] is None:
        return f"{needs}; give --gpu-memory-gib to see how many fit"
    gpu = f"{result['gpu_memory_bytes'] / _GIB:.4g} GiB a GPU"
    if not result["fits"]:
        return f"does not fit: {needs}, there are {gpu}; use more tp or pp, or a smaller --max-model-len"
    sequences = f"{result['full_length_sequences']} sequence(s) of {result['max_model_len']} tokens"
    return f"{gpu}: {result['kv_blocks']} KV blocks = {result['kv_tokens']} tokens, {sequences} at full length"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f}"
