# SPDX-License-Identifier: Apache-2.0
"""Every tensor accounted for: matching a weight declaration with what a checkpoint holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from phalanx.checkpoints.dtypes import PLAIN_DTYPES
from phalanx.checkpoints.formats import Unread
from phalanx.checkpoints.quantized import quantized_tensors
from phalanx.checkpoints.source import Index, TensorSource
from phalanx.checkpoints.spec import Part, WeightSpec, find_stored
from phalanx.parallel.errors import CheckpointError

_ROTARY_TABLES = r"(.*\.)?rotary_(pos_)?emb\.((original_)?inv_freq|_?(cos|sin)(_cached)?|freqs_cis)"
"""Buffers that trainers and old releases of transformers saved."""

__all__ = ["check_unread", "first_few", "fit_index", "list_names", "resolve", "stored_index"]


def resolve(source: TensorSource, specs: Iterable[WeightSpec], ignored: Sequence[str] = ()) -> dict[str, str]:
    """Name in ``source`` of every source tensor that ``specs`` (the whole model) declares.

    A tensor is looked for under its own name and its aliases in order, each also without its first component: so the base model,
    saved without its LM head, spells them (``layers.0...`` for ``model.layers.0...``). Rotary tables are computed, never read.

    Args:
        ignored: regular expressions (full match) of tensors that may be there and are not read.

    Raises:
        CheckpointError: tensors are missing or unused, or one has an unexpected shape or a format that it cannot have.
    """
    declared = dict.fromkeys((part, spec.dtype) for spec in specs for part in spec.parts)
    parts = {part.source: part for part, _ in declared}
    is_plain = all(part.encoding is None and dtype is None for part, dtype in declared)
    present = set(source.names())
    found = {name: find_stored(part.names, present) for name, part in parts.items()}
    if missing := [name for name, stored in found.items() if stored is None]:
        _refuse_quantized(present, is_plain)
        _refuse_undescribed([name for name in missing if parts[name].encoding is not None], present)
        _refuse_packed([name for name in missing if parts[name].encoding is None], present)
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of {len(parts)} tensors that config.json requires: {list_names(missing)}; "
            "a shard is missing, or config.json belongs to another model"
        )
    stored_names = {name: stored for name, stored in found.items() if stored is not None}
    _check_unused(present.difference(stored_names.values()), ignored, is_plain)
    for part, dtype in declared:
        _check_tensor(source, stored_names[part.source], part, dtype)
    return stored_names


def check_unread(
    source: TensorSource, components: Sequence[WeightSpec], ignored: Sequence[str], unread: Sequence[Unread]
) -> None:
    """Look at the tensors of ``source`` that ``components``, those of all weights, do not use, and that a format says hold nothing new.

    Raises:
        CheckpointError: one holds something else.
    """
    stored = resolve(source, components, ignored)
    codes = (part for component in components if component.kind == "codes" for part in component.parts)
    extents = {stored[part.source].rpartition(".")[0]: part.source_extents for part in codes}
    for name in sorted(set(source.names()).difference(stored.values())):
        kind = next((each for each in unread if re.fullmatch(each.pattern, name)), None)
        if kind is None:
            continue
        if not kind.is_so(source.read(name, source.info(name).whole), extents.get(name.rpartition(".")[0], ())):
            raise CheckpointError(
                f"tensor {name!r}, which the model does not use, does not hold {kind.holds}; config.json belongs to another model or "
                "describes another quantisation"
            )


def stored_index(part: Part, rank: int, size: int, shape: tuple[int, ...]) -> Index:
    """The box of the part's source tensor that ``rank`` of ``size`` needs, for a stored tensor of ``shape``."""
    part = part.stored
    spans = [part.span(axis, rank, size) for axis in range(len(part.shape))]
    first_row = (part.first_row, *(0 for _ in spans[1:]))
    index = tuple(slice(first + span.start, first + span.stop) for first, span in zip(first_row, spans, strict=True))
    return fit_index(index[::-1] if part.transposed else index, part.stored_shape, shape)


def fit_index(index: Index, declared: tuple[int, ...], shape: tuple[int, ...]) -> Index:
    """``index`` into a tensor declared as ``declared`` for one of ``shape``, which differs by axes of extent 1 only.

    Writers disagree about these: a scale of a whole matrix is ``[]``, ``[1]`` or ``[1, 1]``, one of rows ``[O]`` or ``[O, 1]``.
    """
    if declared == shape:
        return index
    long = iter(part for part, extent in zip(index, declared, strict=True) if extent != 1)
    return tuple(slice(0, 1) if extent == 1 else next(long) for extent in shape)


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """The first few of ``names``, sorted and quoted, and how many more there are."""
    return first_few([repr(name[:120]) for name in sorted(names)], limit)


def first_few(texts: Sequence[str], limit: int) -> str:
    """At most ``limit`` of ``texts``, and how many more there are: a layer may have hundreds of experts."""
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _check_unused(unused: set[str], ignored: Sequence[str], is_plain: bool) -> None:
    pattern = re.compile("|".join(f"(?:{expression})" for expression in (*ignored, _ROTARY_TABLES)))
    extra = [name for name in unused if not pattern.fullmatch(name)]
    if extra:
        _refuse_quantized(extra, is_plain)
        if not is_plain and quantized_tensors(extra) is not None:
            raise CheckpointError(
                f"the checkpoint holds {list_names(extra)}, which quantization_config in config.json does not describe: a module that it "
                "leaves out is quantised, or has another scheme; restore config.json from where the checkpoint comes from"
            )
        raise CheckpointError(
            f"the checkpoint holds {len(extra)} tensor(s) that the model does not use: {list_names(extra)}; "
            "config.json belongs to another model, or the model has a feature that is not supported"
        )


def _refuse_quantized(names: Iterable[str], is_plain: bool) -> None:
    """Raise `CheckpointError` if ``names`` show that what is declared as plain weights is stored quantised."""
    if is_plain and (method := quantized_tensors(names)) is not None:
        raise CheckpointError(
            f"the checkpoint is quantised ({method}: packed weights or scales among its tensors), though config.json does not say "
            "so; use the unquantised checkpoint, or restore its config.json"
        )


def _refuse_undescribed(missing: Iterable[str], present: Collection[str]) -> None:
    """Raise `CheckpointError` if a module has a weight, but not what its quantisation scheme needs besides: ``missing``."""
    for name in sorted(missing):
        module, _, kind = name.rpartition(".")
        if kind != "weight" and f"{module}.weight" in present:
            raise CheckpointError(
                f"quantization_config in config.json says that {module} is quantised, but the checkpoint has {module}.weight without "
                f"{kind}: list the module among those that stay as they are, or copy the checkpoint again"
            )


def _refuse_packed(missing: Iterable[str], present: Collection[str]) -> None:
    """Raise `CheckpointError` if a module of whose weight the plain values, ``missing``, are required has packed words."""
    for name in sorted(missing):
        module = name.removesuffix(".weight")
        if packed := find_stored([f"{module}.{kind}" for kind in ("weight_packed", "qweight")], present):
            raise CheckpointError(
                f"quantization_config in config.json says that {module} stays as it is, but the checkpoint has {packed} instead of "
                f"{name}: restore config.json from where the checkpoint comes from"
            )


def _check_tensor(source: TensorSource, name: str, part: Part, dtype: str | None) -> None:
    info = source.info(name)
    if not _shapes_agree(info.shape, part):
        scheme = "" if part.encoding is None and dtype is None else " or describes another quantisation"
        raise CheckpointError(
            f"tensor {name!r} has shape {list(info.shape)}, but config.json requires {list(part.stored_shape)}; "
            f"config.json belongs to another model{scheme}"
        )
    if part.encoding is None and dtype is None:
        _check_plain(info.dtype, name)
        return
    accepted = {dtype} if part.encoding is None else part.encoding.dtypes
    if info.dtype not in accepted:
        raise CheckpointError(
            f"tensor {name!r} is stored as {info.dtype}, but its quantisation scheme requires "
            f"{' or '.join(sorted(map(str, accepted)))}; config.json describes another scheme"
        )


def _shapes_agree(shape: tuple[int, ...], part: Part) -> bool:
    if part.encoding is None:
        return shape == part.stored_shape
    return [extent for extent in shape if extent != 1] == [extent for extent in part.stored_shape if extent != 1]


def _check_plain(dtype: str, name: str) -> None:
    if dtype.startswith(("F8", "I", "U")):  # codes
        raise CheckpointError(
            f"tensor {name!r} is stored as {dtype}, but config.json names no quantisation scheme with its scales; "
            "use the unquantised checkpoint"
        )
    if dtype not in PLAIN_DTYPES:
        raise CheckpointError(
            f"tensor {name!r} is stored as {dtype}, which is not a weight dtype; convert it to one of {', '.join(PLAIN_DTYPES)}"
        )
