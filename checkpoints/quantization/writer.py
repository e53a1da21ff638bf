# SPDX-License-Identifier: Apache-2.0
"""Quantising a float checkpoint into compressed-tensors, one matrix at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.config_files import TEMPLATE_FOLDER
from phalanx.checkpoints.file_kinds import WEIGHT_SUFFIXES
from phalanx.checkpoints.manifest import MANIFEST_FILE
from phalanx.checkpoints.partial_directory import PartialDirectory
from phalanx.checkpoints.quantization.choosing import HEAD
from phalanx.checkpoints.quantization.scheme import KV_CACHE_SCHEME, Scheme
from phalanx.checkpoints.safetensors_layout import plan_file
from phalanx.checkpoints.source import TensorInfo, TensorSource
from phalanx.parallel.errors import ConfigError

__all__ = ["Method", "Quantized", "RoundToNearest", "relative_error", "write_quantized"]

Array = NDArray[Any]
WRITTEN = ("model.safetensors", "config.json", TEMPLATE_FOLDER)


class Quantized(NamedTuple):
    """A matrix's tensors by suffix, and the relative error of the values that they stand for."""

    tensors: Mapping[str, Array]
    error: float


class Method(Protocol):
    """How codes are chosen. Names are those of the checkpoint."""

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """``names`` in the order in which they should be asked for."""

    def plain(self, name: str, array: Array) -> Array:
        """What is written for a tensor that is not quantised, in its format and shape."""

    def quantize(self, name: str, weight: Array) -> Quantized:
        """The tensors that are written for a matrix ``[out, in]`` of any float format."""

    def scale_names(self, name: str) -> Sequence[str]:
        """Float32 scales of one element that follow a matrix: those of its layer's cache."""

    def scales(self, name: str) -> Sequence[Array]:
        """Their values, after `quantize` of the matrix."""


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """Each value becomes the nearest code; the rest is copied."""

    scheme: Scheme

    def order(self, names: Sequence[str]) -> Sequence[str]:
        return names

    def plain(self, name: str, array: Array) -> Array:
        return array

    def quantize(self, name: str, weight: Array) -> Quantized:
        wide = weight.astype(np.float32)
        tensors, values = self.scheme.quantize(wide)
        return Quantized(tensors, relative_error(values - wide, wide))

    def scale_names(self, name: str) -> Sequence[str]:
        return ()

    def scales(self, name: str) -> Sequence[Array]:
        return ()


def relative_error(difference: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Of matrices. Summed in float64: over 100 million values float32 is off by 0.4 %, and it overflows above 1.8e19."""
    one, other = (math.sqrt(np.einsum("ij,ij->", x, x, dtype=np.float64)) for x in (difference, exact))
    return one / max(other, 1e-30)


def write_quantized(
    source: TensorSource,
    directory: Path,
    config: Mapping[str, Any],
    chosen: Mapping[str, bool],
    ignored: Sequence[str],
    scheme: Scheme,
    method: Method,
    output: Path,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Write ``output``; the relative error of each quantised weight, by its name in the checkpoint.

    Args:
        directory: where tokenizer and the other small files come from.
        chosen: names of the matrices to quantise, and whether they are stored ``[in, out]``; they are written ``[out, in]``.
        ignored: modules of the other matrices, or ``re:`` and an expression; the head need not be among them, because a tied one is a module that stores nothing.
        progress: told each tensor's name once it is written.

    Raises:
        ConfigError: a matrix does not fit the scheme's groups, or ``output`` exists or cannot be written.
    """
    names = method.order(sorted(source.names()))
    _check_groups(
        {name: source.info(name).shape[0 if is_transposed else 1] for name, is_transposed in chosen.items()}, scheme
    )
    layout = []
    for name in names:
        layout += _stored(source, name, chosen.get(name), scheme)
        layout += [(scale, TensorInfo((1,), "F32")) for scale in method.scale_names(name)]
    has_cache_scales = any(method.scale_names(name) for name in names)
    unfinished = PartialDirectory(output, lambda name: name in WRITTEN or (directory / name).is_file())
    errors = {}
    with unfinished.written() as partial, open(partial / "model.safetensors", "wb") as file:
        file.write(plan_file(layout, {"format": "pt"}).header)
        for name in names:
            array = source.read(name, source.info(name).whole)
            if name not in chosen:
                file.write(method.plain(name, array).tobytes())
            else:
                matrix = np.ascontiguousarray(array.T) if chosen[name] else array
                tensors, errors[name] = method.quantize(name, matrix)
                for suffix in scheme.tensors(*matrix.shape):
                    file.write(tensors[suffix].tobytes())
                for scale in method.scales(name):
                    file.write(scale.tobytes())
            progress(name)
        _copy_small_files(directory, partial)
        cache = {"kv_cache_scheme": dict(KV_CACHE_SCHEME)} if has_cache_scales else {}
        section = {**scheme.section, "ignore": sorted({HEAD, *ignored}), **cache}
        (partial / "config.json").write_text(json.dumps({**config, "quantization_config": section}, indent=2) + "\n")
    return errors


def _check_groups(columns: Mapping[str, int], scheme: Scheme) -> None:
    for name, count in columns.items():
        if scheme.group_size and count % scheme.group_size:
            common = math.gcd(*columns.values())
            largest = min(common & -common, 1 << (scheme.group_size.bit_length() - 1))
            raise ConfigError(
                f"--group-size={scheme.group_size} does not divide the {count} columns of {name}; use {largest}, the largest power of two "
                "that divides those of all matrices, or 0 for whole rows"
            )


def _stored(source: TensorSource, name: str, transposed: bool | None, scheme: Scheme) -> list[tuple[str, TensorInfo]]:
    """What is written for a tensor; ``transposed``: how a matrix to quantise is stored, None for all else."""
    info = source.info(name)
    if transposed is None:
        return [(name, info)]
    rows, columns = info.shape[::-1] if transposed else info.shape
    module = name.removesuffix(".weight")
    return [(f"{module}.{suffix}", tensor) for suffix, tensor in scheme.tensors(rows, columns).items()]


def _copy_small_files(directory: Path, output: Path) -> None:
    """Tokenizer, chat templates, generation defaults: what is neither weights, nor their index or manifest, nor ``config.json``."""
    for path in directory.iterdir():
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in ("config.json", MANIFEST_FILE):
            shutil.copyfile(path, output / path.name)
    templates = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    if templates:
        (output / TEMPLATE_FOLDER).mkdir()
    for path in templates:
        shutil.copyfile(path, output / TEMPLATE_FOLDER / path.name)
