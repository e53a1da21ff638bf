# SPDX-License-Identifier: Apache-2.0
"""Tied embeddings next to an LM head that the file holds all the same: a copy, another head, or a quantised one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from phalanx.checkpoints.source import TensorSource
from phalanx.checkpoints.spec import Part, find_stored
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model

__all__ = ["with_stored_head"]

CHUNK_BYTES = 4 << 20


def with_stored_head(model: Model, config: ModelConfig, source: TensorSource) -> ModelConfig:
    """Untie ``config`` if ``source`` holds an LM head that differs from the token table, as transformers 5 does, or codes of one.

    A head equal to the table is a copy, which is not loaded. Comparing ends at the first difference; it reads both tensors once,
    at the speed of the page cache, in checkpoints that hold both.

    Raises:
        CheckpointError: the tensors cannot be read.
    """
    if not config.tie_embeddings:
        return config
    untied = dataclasses.replace(config, tie_embeddings=False)
    table, head = _head_part(model, config), _head_part(model, untied)
    names = source.names()
    stored_head = find_stored(head.names, names)
    stored_table = find_stored([name for name in table.names if name not in head.names], names)
    if stored_table is None:
        return config
    if stored_head is None:
        return untied if _is_packed(head, names) else config
    return config if _equal(source, stored_table, stored_head) else untied


def _head_part(model: Model, config: ModelConfig) -> Part:
    return next(spec.parts[0] for spec in model.decode.head_weights(config) if spec.name == "lm_head.weight")


def _is_packed(head: Part, names: Iterable[str]) -> bool:
    """Whether there are tensors of the head's module, though no weight: GPTQ and compressed-tensors call packed codes otherwise."""
    modules = {name.rpartition(".")[0] for name in head.names}
    return any(module in modules and kind != "bias" for module, _, kind in (name.rpartition(".") for name in names))


def _equal(source: TensorSource, first: str, second: str) -> bool:
    """Whether two matrices hold the same bytes."""
    info = source.info(first)
    if info != source.info(second):
        return False
    rows = max(1, CHUNK_BYTES * info.shape[0] // max(1, info.num_bytes))
    for low in range(0, info.shape[0], rows):
        index = (slice(low, min(low + rows, info.shape[0])), *info.whole[1:])
        if source.read(first, index).tobytes() != source.read(second, index).tobytes():
            return False
    return True
