# SPDX-License-Identifier: Apache-2.0
"""``--quantize``: float weights that become codes while they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from phalanx.checkpoints.formats import FormattedWeight
from phalanx.checkpoints.quantization.held import QuantizeName, check_not_quantized, quantized_while_loading
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.source import Array
from phalanx.runtime.executors.weights import Weight

__all__ = ["formats_while_loading", "quantised"]


def formats_while_loading(declared: Iterable[FormattedWeight], quantize: QuantizeName) -> dict[str, RowCodes]:
    """Formats of the weights that are quantised, by the names that models use.

    Raises:
        ConfigError: the checkpoint is quantised already.
    """
    if quantize == "none":
        return {}
    weights = list(declared)
    check_not_quantized((weight.format for weight in weights), quantize)
    chosen = RowCodes(quantize)
    return {weight.spec.owner: chosen for weight in weights if quantized_while_loading(weight.spec)}


def quantised(weight: Weight[Array], formats: Mapping[str, RowCodes]) -> Weight[Array]:
    """A float weight in the format that it is to have; itself where it is to stay."""
    chosen = formats.get(weight.name)
    if chosen is None:
        return weight
    values = weight.components["weight"].astype(np.float32, copy=False)
    return replace(weight, format=chosen, components=chosen.quantize(values))
