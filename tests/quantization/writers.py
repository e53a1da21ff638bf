"""Quantised checkpoints in the formats of other tools, written from a float one, and float twins with the values they stand for.

The packers here follow the formats' definitions with Python integers and know nothing of the code that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
Written = tuple[dict[str, Array], Array]
"""Tensors of a module by suffix, and the float32 values that they stand for."""

E4M3 = ml_dtypes.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


Module = Callable[[Array], Written]
"""What quantises one matrix."""


def write(dense: Path, quantised: Path, twin: Path, module: Module | Mapping[str, Module], section: dict[str, Any],
          extra: dict[str, Array] | None = None, also: tuple[str, ...] = ()) -> None:  # fmt: skip
    """``module`` quantises the matrices of layers, perhaps differently by a part of their names, and ``also``; the rest is copied."""
    stored: dict[str, Array] = dict(extra or {})
    values: dict[str, Array] = {}
    for name, array in load_file(dense / "model.safetensors").items():
        if array.ndim == 2 and (".layers." in name or name in also):
            chosen = module if callable(module) else next(one for part, one in module.items() if part in name)
            tensors, values[name] = chosen(array)
            stored |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in tensors.items()}
        else:
            stored[name] = values[name] = array
    config = json.loads((dense / "config.json").read_text())
    for path, tensors, more in ((quantised, stored, {"quantization_config": section}), (twin, values, {})):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | more))
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")


def pack(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Unsigned codes ``[..., n]`` to ``[..., ceil(n / per word)]`` int32; element ``order[i]`` of each word at bits ``bits * i``."""
    each = 32 // bits
    words = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        row = row + [0] * (-len(row) % each)
        for first in range(0, len(row), each):
            places = order or tuple(range(each))
            words.append(sum(int(row[first + place]) << bits * i for i, place in enumerate(places)))
    return np.array(words, np.uint32).view(np.int32).reshape(*codes.shape[:-1], -1)


def grouped(w: Array, bits: int, group: int, symmetric: bool, scale_dtype: Any) -> tuple[Array, Array, Array]:
    """Unsigned codes ``[O, I]``, scales and zero points ``[O, G]``; the last group may be short."""
    half, top = 1 << (bits - 1), (1 << bits) - 1
    columns = [slice(first, first + group) for first in range(0, w.shape[1], group)] if group else [slice(None)]
    codes, scales, zeros = np.empty(w.shape, np.int64), [], []
    for part in columns:
        low, high = w[:, part].min(1), w[:, part].max(1)
        scale = (np.maximum(-low, high) / (half - 0.5) if symmetric else (high - low) / top).astype(scale_dtype)
        wide = scale.astype(np.float32)
        zero = np.full(len(w), half) if symmetric else np.clip(np.rint(-low / wide), 0, top)
        codes[:, part] = np.clip(np.rint(w[:, part] / wide[:, None]) + zero[:, None], 0, top)
        scales.append(scale)
        zeros.append(zero.astype(np.int64))
    return codes, np.stack(scales, 1), np.stack(zeros, 1)


def values_of(codes: Array, scales: Array, zeros: Array, group: int) -> Array:
    """``(code - zero) * scale`` in float64, which float32 holds exactly."""
    wide = [
        np.repeat(one.astype(np.float64), group or codes.shape[1], axis=1)[:, : codes.shape[1]]
        for one in (zeros, scales)
    ]
    return ((codes - wide[0]) * wide[1]).astype(np.float32)


def compressed_int(bits: int, group: int, symmetric: bool, in_order: bool = True) -> Callable[[Array], Written]:
    """Out of order as `gptq`."""
    random = np.random.default_rng(8)

    def module(w: Array) -> Written:
        order = np.arange(w.shape[1]) if in_order else random.permutation(w.shape[1])
        back = np.argsort(order)
        codes, scales, zeros = grouped(w[:, order], bits, group, symmetric, ml_dtypes.bfloat16)
        tensors = {
            "weight_packed": pack(codes[:, back], bits),
            "weight_scale": scales,
            "weight_shape": np.array(w.shape, np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.T, bits).T
        if not in_order:
            tensors["weight_g_idx"] = (np.arange(w.shape[1]) // group)[back].astype(np.int32)
        return tensors, values_of(codes, scales, zeros, group)[:, back]

    return module


def compressed_int_unset(bits: int, group: int) -> Module:
    """With an index of groups that says nothing: all -1."""

    def module(w: Array) -> Written:
        tensors, values = compressed_int(bits, group, False)(w)
        return {**tensors, "weight_g_idx": np.full(w.shape[1], -1, np.int32)}, values

    return module


def compressed_section(
    weights: dict[str, Any], layout: str, inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def gptq(bits: int, group: int, symmetric: bool, v1: bool, in_order: bool = True) -> Callable[[Array], Written]:
    """Out of order, columns are quantised in an order that differs between modules, as GPTQ does it by activations."""
    random = np.random.default_rng(7)

    def module(w: Array) -> Written:
        order = np.arange(w.shape[1]) if in_order else random.permutation(w.shape[1])
        back = np.argsort(order)
        codes, scales, zeros = grouped(w[:, order], bits, group, symmetric, np.float16)
        stored = (zeros - int(v1)) % (1 << bits)
        columns = w.shape[1]
        tensors = {
            "qweight": pack(codes[:, back], bits).T, "qzeros": pack(stored.T, bits), "scales": scales.T,
            "g_idx": (np.arange(columns) // (group or columns))[back].astype(np.int32),
        }  # fmt: skip
        return tensors, values_of(codes, scales, zeros, group)[:, back]

    return module


def awq(group: int) -> Callable[[Array], Written]:
    def module(w: Array) -> Written:
        codes, scales, zeros = grouped(w, 4, group, False, np.float16)
        tensors = {"qweight": pack(codes.T, 4, AWQ_ORDER), "qzeros": pack(zeros.T, 4, AWQ_ORDER), "scales": scales.T}
        return tensors, values_of(codes, scales, zeros, group)

    return module


def fp8(
    strategy: str,
    suffix: str = "weight_scale",
    dtype: Any = np.float32,
    input_scale: float | None = None,
    powers: bool = False,
) -> Callable[[Array], Written]:
    """``strategy``: ``tensor``, ``channel``, ``block`` of 32 x 16, or ``large block`` of 128 x 128; ``powers`` of two, stored as such."""

    def module(w: Array) -> Written:
        rows, columns = {
            "tensor": w.shape, "channel": (1, w.shape[1]), "block": (32, 16), "large block": (128, 128),
        }[strategy]  # fmt: skip
        stored = ml_dtypes.float8_e8m0fnu if powers else dtype
        scales = np.empty((-(-w.shape[0] // rows), -(-w.shape[1] // columns)), stored)
        codes = np.empty(w.shape, E4M3)
        values = np.empty(w.shape, np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                largest = np.abs(w[block]).max() / 448
                scales[i, j] = 2.0 ** np.ceil(np.log2(largest)) if powers else largest
                codes[block] = np.clip(w[block] / np.float32(scales[i, j]), -448, 448).astype(E4M3)
                values[block] = codes[block].astype(np.float32) * np.float32(scales[i, j])
        tensors: dict[str, Array] = {"weight": codes, suffix: scales.reshape(1) if strategy == "tensor" else scales}
        if input_scale is not None:
            tensors["input_scale"] = np.array([input_scale], np.float32)
        return tensors, values

    return module


def int8(w: Array) -> Written:
    scale = np.abs(w).max(1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.rint(w / scale), -128, 127).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


def factors(columns: int, seed: int = 3) -> Array:
    """``pre_quant_scale`` of inputs, the same for all matrices of so many columns."""
    return np.random.default_rng(seed).uniform(0.5, 2.0, columns).astype(np.float32)


def modelopt_awq(group: int, scaled: Array | None = None) -> Module:
    """W4A16_AWQ; ``scaled``: factors of the inputs, by which columns are divided."""

    def module(w: Array) -> Written:
        p = np.ones(w.shape[1], np.float32) if scaled is None else scaled
        groups = (w / p).reshape(len(w), -1, group)
        scale = np.abs(groups).max(2) / np.float32(7)
        codes = np.clip(np.rint(groups / scale[:, :, None]), -8, 7).astype(np.int64).reshape(w.shape)
        low, high = codes[0::2] % 16, codes[1::2] % 16
        tensors = {"weight": (low + 16 * high).astype(np.uint8), "weight_scale": scale}
        values = codes.astype(np.float32) * np.repeat(scale, group, axis=1)
        return (tensors if scaled is None else {**tensors, "pre_quant_scale": p}), values * p

    return module


def modelopt_awq_usual(group: int) -> dict[str, Module]:
    """Factors where ModelOpt leaves them: before the output and down projections."""

    def scaled(w: Array) -> Written:
        return modelopt_awq(group, factors(w.shape[1]))(w)

    return {"o_proj": scaled, "down_proj": scaled, "": modelopt_awq(group)}


def modelopt_smoothquant(input_scale: float) -> Module:
    """W8A8_SQ_PER_CHANNEL."""

    def module(w: Array) -> Written:
        p = factors(w.shape[1])
        scale = np.abs(w / p).max(1) / np.float32(127)
        codes = np.clip(np.rint(w / p / scale[:, None]), -128, 127).astype(np.int8)
        tensors = {
            "weight": codes, "weight_scale": scale, "pre_quant_scale": p, "input_scale": np.array(input_scale, np.float32)
        }  # fmt: skip
        return tensors, codes.astype(np.float32) * scale[:, None] * p

    return module


def modelopt_blocks(w: Array) -> Written:
    """FP8_PB_WO, whose scales have the axes that ModelOpt's blocks have."""
    tensors, values = fp8("large block")(w)
    return {**tensors, "weight_scale": tensors["weight_scale"][:, None, :, None]}, values


def as_it_is(w: Array) -> Written:
    return {"weight": w}, w


def weight_only_int8(w: Array) -> Written:
    """ModelOpt's W8A16."""
    scale = np.abs(w).max(1) / np.float32(127)
    codes = np.clip(np.rint(w / scale[:, None]), -128, 127).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale[:, None]


def int8_static(input_scale: float) -> Module:
    def module(w: Array) -> Written:
        tensors, values = int8(w)
        return {**tensors, "input_scale": np.array([input_scale], np.float32)}, values

    return module
