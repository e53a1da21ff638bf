# SPDX-License-Identifier: Apache-2.0
"""Which weight and cache formats the installed TensorRT can compute with, asked before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from phalanx.checkpoints.formats import DENSE, FormatPlan, FormattedWeight, format_weights
from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.held import QuantizeName
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.quantised_loading import formats_while_loading
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES
from phalanx.runtime.models import Model
from phalanx.runtime.quantisation import schemes_in_words

__all__ = ["check_cache", "check_formats", "check_stripped", "network_weights", "notes", "quantised_formats"]


def network_weights(
    model: Model, config: ModelConfig, formats: FormatPlan, quantize: QuantizeName
) -> list[FormattedWeight]:  # fmt: skip
    """Every weight with the format that networks compute with: the checkpoint's, or what ``--quantize`` makes of it.

    Raises:
        ConfigError: a group of values would have to be cut, or the checkpoint is quantised already.
    """
    weights = format_weights(model.weights(config), formats)
    chosen = formats_while_loading(weights, quantize)
    return [replace(weight, format=chosen.get(weight.spec.owner, weight.format)) for weight in weights]


def check_formats(
    library: TensorRT, config: ModelConfig, weights: Iterable[FormattedWeight], targets: Sequence[str]
) -> None:
    """Refuse weights that networks for these compute capabilities cannot hold.

    Raises:
        ConfigError: naming the first weight, its format and what can be done instead.
    """
    unknown = []
    for weight in weights:
        if isinstance(weight.format, RowCodes | GroupCodes):
            _check_kind(library, weight.spec.owner, weight.format, targets)
        else:
            unknown.append(weight)
    CAPABILITIES.check_formats(config, unknown)


def _check_kind(library: TensorRT, name: str, chosen: RowCodes | GroupCodes, targets: Sequence[str]) -> None:
    if library.computes_segments:
        raise ConfigError(
            f"{name} is {chosen.name}, but {library.name} computes with plain weights only; use --engine cuda, or install a newer TensorRT"
        )
    if chosen.kind not in library.code_kinds(targets):
        raise ConfigError(
            f"{name} is {chosen.name}, which {library.name} cannot build for compute capability {', '.join(targets)} (fp8 needs 8.9); "
            "use an int8 or 4-bit checkpoint, build for other GPUs (--target-compute-capability), or use --engine numpy"
        )


def check_cache(library: TensorRT, is_fp8: bool, dtype: str) -> None:
    """Refuse a cache of fp8 where it is a layer of the network; ``dtype``: compute type.

    Raises:
        ConfigError: with what can be done instead.
    """
    if not is_fp8 or library.has_fp8_cache:
        return
    raise ConfigError(
        f"keys and values are to be held as fp8 (--kv-cache-dtype, or the checkpoint's scales), but the cache layer of {library.name} takes "
        f"16- and 32-bit types only; use --kv-cache-dtype {dtype}, or --engine cuda"
    )


def check_stripped(weights: Iterable[FormattedWeight]) -> None:
    """Refuse engines without weights where some are codes, which the network holds in another form.

    Raises:
        ConfigError: naming the first.
    """
    for weight in weights:
        if weight.format != DENSE:
            raise ConfigError(
                f"--stripped leaves out plain weights only, but {weight.spec.owner} is {weight.format.name}; leave --stripped out"
            )


def quantised_formats(weights: Iterable[FormattedWeight]) -> tuple[str, ...]:
    """Every format but plain values, each once, with all that tells it from others."""
    return tuple(sorted({repr(weight.format) for weight in weights if weight.format != DENSE}))


def notes(weights: Sequence[FormattedWeight], formats: FormatPlan, dtype: str) -> list[str]:
    """What an operator should know of engines of a quantised checkpoint, a sentence each."""
    found = [(weight.format.scheme, weight.spec) for weight in weights]
    lines = [f"weights: {schemes_in_words(found)}"] if any(scheme for scheme, _ in found) else []
    if formats.has_kv_scales:
        lines.append(f"the checkpoint's cache scales are not used: start with --kv-cache-dtype {dtype}")
    return lines
