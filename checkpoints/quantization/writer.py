"""Quantising a float checkpoint into compressed-tensors, one matrix at a time, by rounding to nearest.

Source of the format: compressed-tensors ``compressors/quantized_compressors/{naive,pack}_quantized.py``. Symmetric integer scales are
amax / (range / 2), so that codes reach -128 and -8, as its own observers have it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.numbers import quantize_rows
from phalanx.checkpoints.safetensors_layout import plan_file
from phalanx.checkpoints.source import TensorInfo, TensorSource
from phalanx.parallel.errors import ConfigError

__all__ = ["Scheme", "SchemeName", "write_quantized"]

SchemeName = Literal["fp8", "int8", "w8a16", "w4a16"]
Array = NDArray[Any]
_BITS = {"w8a16": 8, "w4a16": 4}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What weights become. ``group_size`` columns share a scale in w8a16 and w4a16; 0 = the row.

    Raises:
        ConfigError: groups that the scheme does not have.
    """

    name: SchemeName
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 0 or (self.group_size and self.name not in _BITS):
            raise ConfigError(f"--group-size={self.group_size} does not fit --scheme={self.name}; leave it out")

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        """What a module of ``[rows, columns]`` is stored as, by suffix."""
        if self.name not in _BITS:
            codes = "F8_E4M3" if self.name == "fp8" else "I8"
            return {"weight": TensorInfo((rows, columns), codes), "weight_scale": TensorInfo((rows, 1), "F32")}
        words, groups = -(-columns * _BITS[self.name] // 32), columns // (self.group_size or columns)
        return {
            "weight_packed": TensorInfo((rows, words), "I32"),
            "weight_scale": TensorInfo((rows, groups), "F32"),
            "weight_shape": TensorInfo((2,), "I64"),
        }

    def quantize(self, weight: NDArray[np.float32]) -> tuple[dict[str, Array], NDArray[np.float32]]:
        """The tensors, and the values that they stand for."""
        if self.name == "fp8":
            codes = quantize_rows(weight)
            return {"weight": codes.codes, "weight_scale": codes.scale}, codes.codes.astype(np.float32) * codes.scale
        bits = _BITS.get(self.name, 8)
        half, columns = 1 << (bits - 1), weight.shape[1]
        groups = weight.reshape(len(weight), -1, self.group_size or columns)
        scale = np.maximum(np.abs(groups).max(axis=2) / np.float32(half - 0.5), np.float32(2.0**-40))
        rounded = np.clip(np.rint(groups / scale[:, :, None]), -half, half - 1)
        values = (rounded * scale[:, :, None]).reshape(weight.shape)
        integers = rounded.reshape(weight.shape).astype(np.int8)
        if self.name == "int8":
            return {"weight": integers, "weight_scale": scale}, values
        shape = np.array(weight.shape, np.int64)
        return {"weight_packed": _packed(integers, bits), "weight_scale": scale, "weight_shape": shape}, values

    @property
    def section(self) -> dict[str, Any]:
        """``quantization_config``, less ``ignore``."""
        is_packed, kind = self.name in _BITS, "float" if self.name == "fp8" else "int"
        weights: dict[str, Any] = {
            "num_bits": _BITS.get(self.name, 8), "type": kind, "symmetric": True, "dynamic": False,
            "strategy": "group" if self.group_size else "channel",
        }  # fmt: skip
        if self.group_size:
            weights["group_size"] = self.group_size
        inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
        layout = "pack-quantized" if is_packed else f"{kind}-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None if is_packed else inputs,
                 "output_activations": None, "format": layout}  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        }  # fmt: skip


def write_quantized(
    source: TensorSource,
    directory: Path,
    config: Mapping[str, Any],
    chosen: set[str],
    scheme: Scheme,
    output: Path,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Write ``output``; the relative error of each quantised weight, by its name in the checkpoint.

    Args:
        directory: where tokenizer and the other small files come from.
        chosen: names of the matrices to quantise; all other tensors are copied.
        progress: told each tensor's name once it is written.

    Raises:
        ConfigError: a matrix does not fit the scheme's groups, or ``output`` exists.
    """
    if output.exists():
        raise ConfigError(f"--output {str(output)!r} exists; remove it or choose another name")
    names = sorted(source.names())
    layout = [(stored, info) for name in names for stored, info in _stored(source, name, name in chosen, scheme)]
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    errors = {}
    with open(partial / "model.safetensors", "wb") as file:
        file.write(plan_file(layout, {"format": "pt"}).header)
        for name in names:
            array = source.read(name, source.info(name).whole)
            if name not in chosen:
                file.write(array.tobytes())
            else:
                wide = array.astype(np.float32)
                tensors, values = scheme.quantize(wide)
                for suffix in scheme.tensors(*wide.shape):
                    file.write(tensors[suffix].tobytes())
                errors[name] = float(np.linalg.norm(values - wide)) / max(float(np.linalg.norm(wide)), 1e-30)
            progress(name)
    _copy_small_files(directory, partial)
    ignored = sorted(name.removesuffix(".weight") for name in names if name == "lm_head.weight")
    section = {**scheme.section, "ignore": ignored or ["lm_head"]}
    (partial / "config.json").write_text(json.dumps({**config, "quantization_config": section}, indent=2) + "\n")
    partial.rename(output)
    return errors


def _stored(source: TensorSource, name: str, is_chosen: bool, scheme: Scheme) -> list[tuple[str, TensorInfo]]:
    info = source.info(name)
    if not is_chosen:
        return [(name, info)]
    rows, columns = info.shape
    if scheme.group_size and columns % scheme.group_size:
        raise ConfigError(
            f"--group-size={scheme.group_size} does not divide the {columns} columns of {name}; use one that does"
        )
    module = name.removesuffix(".weight")
    return [(f"{module}.{suffix}", tensor) for suffix, tensor in scheme.tensors(rows, columns).items()]


def _copy_small_files(directory: Path, output: Path) -> None:
    """Tokenizer, chat template, generation defaults: what is neither weights, nor their index, nor ``config.json``."""
    for path in directory.iterdir():
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(
            ".index.json"
        )
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, output / path.name)


def _packed(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """``[O, ceil(I * bits / 32)]``: code + 2^(bits - 1), element j of a word at bits ``bits * j``, zeros after the last."""
    each = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.uint32)
    padded[:, : codes.shape[1]] = codes.astype(np.int16) + (1 << (bits - 1))
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words: NDArray[np.int32] = np.bitwise_or.reduce(padded.reshape(len(codes), -1, each) << shifts, axis=2).view(
        np.int32
    )
    return words
