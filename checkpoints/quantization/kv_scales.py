# SPDX-License-Identifier: Apache-2.0
"""Scales of an fp8 key/value cache, which checkpoints that were calibrated for one bring along.

Found under the names that compressed-tensors, vLLM and ModelOpt have given them; a scheme that is promised without scales is an
error, because scales of one could saturate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.encodings import Scales
from phalanx.checkpoints.source import TensorSource
from phalanx.checkpoints.spec import Part, WeightSpec, find_stored
from phalanx.parallel.errors import CheckpointError

__all__ = ["attention_module", "read_kv_scales", "stored_kv_scales"]

_NAMES = {
    "key": ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "value": ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}


def read_kv_scales(source: TensorSource, attention: Sequence[str], num_kv_heads: int) -> NDArray[np.float32]:
    """``[2, num_kv_heads]``: what codes of keys and of values are multiplied by, for every head of the model.

    Args:
        attention: module of a layer, ``model.layers.3.self_attn``, by all names that it may have.

    Raises:
        CheckpointError: a scale is missing, or no scale.
    """
    present = set(source.names())
    return np.stack([_read(source, attention, kind, names, present, num_kv_heads) for kind, names in _NAMES.items()])


def attention_module(name: str) -> str:
    """``model.layers.3.self_attn`` of ``model.layers.3.self_attn.q_proj.weight``."""
    return name.removesuffix(".weight").rpartition(".")[0]


def stored_kv_scales(source: TensorSource, weights: Iterable[WeightSpec]) -> list[WeightSpec]:
    """The scales in ``source`` that are next to ``weights``, which every rank of their stage needs whole, as what a split holds."""
    present = set(source.names())
    modules = dict.fromkeys(attention_module(name) for spec in weights for part in spec.parts for name in part.names)
    names = dict.fromkeys(one for both in _NAMES.values() for one in both)
    stored = dict.fromkeys(find_stored([f"{module}.{name}"], present) for module in modules for name in names)
    sizes = {name: math.prod(source.info(name).shape) for name in stored if name is not None}
    return [WeightSpec(name, (Part(name, (size,), encoding=Scales(of="inputs")),)) for name, size in sizes.items()]


def _read(
    source: TensorSource,
    attention: Sequence[str],
    kind: str,
    names: Sequence[str],
    present: set[str],
    num_kv_heads: int,
) -> NDArray[np.float32]:
    name = find_stored([f"{module}.{one}" for module in attention for one in names], present)
    if name is None:
        raise CheckpointError(
            f"quantization_config in config.json promises an fp8 key/value cache, but {attention[0]} has no {kind} scale (looked for "
            f"{', '.join(names)}); use a calibrated checkpoint, or remove kv_cache_scheme from config.json"
        )
    info = source.info(name)
    stored = source.read(name, info.whole).astype(np.float32).reshape(-1)
    if len(stored) not in (1, num_kv_heads) or not (np.isfinite(stored) & (stored > 0)).all():
        raise CheckpointError(
            f"tensor {name!r} holds {stored[:4].tolist()}; a scale of an fp8 cache is one positive number, or one for each of "
            f"{num_kv_heads} heads"
        )
    return np.broadcast_to(stored, (num_kv_heads,))
