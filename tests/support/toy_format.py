"""A second weight format, as somebody who adds one would write it: 4-bit codes in words, a float16 scale per group of inputs.

Stored, for a module of ``[O, I]``: ``codes`` I32 ``[O, ceil(I / 8)]``, element j of a word in bits 4j, code + 8; ``scales`` F16
``[O, ceil(I / g)]``; ``gain`` F32 ``[1]``, a factor for the whole module. In memory: codes I8 ``[O, I]``, scale F32
``[O, ceil(I / g)]``, gain F32 ``[O, 1]``. ``w = code * scale * gain``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.encoding import Block
from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Multiply
from phalanx.checkpoints.spec import DummyRange, Part, WeightSpec

Array = np.ndarray[Any, Any]

SECTION = {
    "quant_method": "toy",
    "group_size": 16,
    "ignore": ["model.layers.1.self_attn", "model.embed_tokens", "lm_head"],
}


@dataclass(frozen=True, slots=True)
class Words:
    """Eight codes in a word, along inputs."""

    dtypes = frozenset({"I32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return Block(), Block(1, 8)

    def decode(self, stored: Array) -> Array:
        codes = (stored[..., None] >> np.arange(0, 32, 4, dtype=np.int32)) & 15
        return (codes - 8).astype(np.int8).reshape(len(stored), -1)


@dataclass(frozen=True, slots=True)
class Widened:
    """One element for one value, in another format."""

    dtypes = frozenset({"F16"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return (Block(),) * len(extents)

    def decode(self, stored: Array) -> Array:
        return stored.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Repeated:
    """One element for all rows of a module."""

    rows: int
    dtypes = frozenset({"F32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return Block(1, self.rows), Block()

    def decode(self, stored: Array) -> Array:
        return np.repeat(stored, self.rows, axis=0)


@dataclass(frozen=True, slots=True)
class ToyFormat:
    """4-bit codes with a scale per row and ``group`` inputs."""

    group: int
    name = "toy int4"
    scheme = "toy int4"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, self.group

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        def component(name: str, parts: list[Part], dtype: str, dummy: DummyRange) -> WeightSpec:
            return WeightSpec(f"{spec.owner}.{name}", tuple(parts), dtype, dummy)

        return (
            component("codes", [self._codes(part) for part in spec.parts], "I8", DummyRange(-7.0, 8.0)),
            component("scale", [self._scales(part) for part in spec.parts], "F32", DummyRange(0.01, 0.02)),
            component("gain", [_gain(part) for part in spec.parts], "F32", DummyRange(1.0, 1.5)),
        )

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        codes, scale, gain = (components[name] for name in ("codes", "scale", "gain"))
        columns = np.repeat(scale, self.group, axis=1)[:, : codes.shape[1]]
        return codes.astype(np.float32) * columns * gain

    def _codes(self, part: Part) -> Part:
        return replace(part, source=_stored(part, "codes"), encoding=Words())

    def _scales(self, part: Part) -> Part:
        shape = (part.shape[0], -(-part.shape[1] // self.group))
        shard = part.shard
        if shard is not None and shard.axis == 1:
            shard = replace(shard, unit=shard.unit // self.group, has_short_last=False)
        return replace(part, source=_stored(part, "scales"), shape=shape, shard=shard, encoding=Widened())

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"weight": self.dequantize(components)}

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        return multiply(x, operand["weight"])


def _gain(part: Part) -> Part:
    shard = None if part.shard is None or part.shard.axis else part.shard
    shape = (part.shape[0], 1)
    return replace(part, source=_stored(part, "gain"), shape=shape, shard=shard, encoding=Repeated(part.shape[0]))


def _stored(part: Part, name: str) -> str:
    return f"{part.source.removesuffix('.weight')}.{name}"


def read_toy(section: Mapping[str, Any]) -> FormatPlan:
    """Formats by the module names in ``ignore``."""
    quantised = ToyFormat(section["group_size"])

    def choose(spec: WeightSpec) -> Format:
        is_ignored = any(spec.parts[0].source.startswith(prefix) for prefix in section["ignore"])
        return DENSE if is_ignored else quantised

    return FormatPlan(choose, (r".*\.note",))


def write_toy(dense: Path, quantised: Path, twin: Path) -> None:
    """Quantise the float32 checkpoint ``dense``; ``twin`` gets the dequantised values as a dense checkpoint."""
    group, stored, values = SECTION["group_size"], {}, {}
    config = json.loads((dense / "config.json").read_text())
    for name, array in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if array.ndim < 2 or name.startswith(tuple(SECTION["ignore"])):
            stored[name] = values[name] = array
            continue
        codes, scales, gain = _quantise(array, group)
        stored |= {f"{module}.codes": _packed(codes), f"{module}.scales": scales, f"{module}.gain": np.array([gain])}
        wide = np.repeat(scales.astype(np.float32), group, axis=1)[:, : array.shape[1]]
        values[name] = codes.astype(np.float32) * wide * gain
    stored["model.note"] = np.zeros(1, np.float32)
    for path, tensors, section in ((quantised, stored, {"quantization_config": SECTION}), (twin, values, {})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | section))
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")


def _quantise(array: Array, group: int) -> tuple[Array, Array, np.float32]:
    gain = np.float32(abs(array).max() / 3)
    padded = np.zeros((len(array), -(-array.shape[1] // group) * group), np.float32)
    padded[:, : array.shape[1]] = array / gain
    groups = padded.reshape(len(array), -1, group)
    scales = (abs(groups).max(axis=2) / 7).astype(np.float16)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)[:, :, None]), -7, 7)
    return codes.reshape(padded.shape)[:, : array.shape[1]].astype(np.int8), scales, gain


def _packed(codes: Array) -> Array:
    padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.int64)
    padded[:, : codes.shape[1]] = codes + 8
    words = (padded.reshape(len(codes), -1, 8) << np.arange(0, 32, 4)).sum(axis=2)
    return words.astype(np.uint32).view(np.int32)
