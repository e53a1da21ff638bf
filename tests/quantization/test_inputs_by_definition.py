"""Formats with quantised inputs at every layout and odd sizes, against a Llama in float64 that rounds inputs by definition.

A rank's share of the columns of an output or down projection has its own scale for each token, and its groups of columns are counted
from its first one. So codes are those of the unsplit model with a scale for all tokens, and with groups that no rank's columns cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.formats import format_weights
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CheckpointCase, write_checkpoint
from tests.support.float64_llama import Float64Llama

from . import test_checkpoints as checkpoints
from . import writers

Array = np.ndarray[Any, Any]
Round = Callable[[Array], Array]
"""Values of the codes of inputs ``[T, I]``, of one rank's columns."""
PROMPT = [5, 17, 3, 99, 42, 8, 61]
TIED = CheckpointCase("llama-344-tied", {**checkpoints.ODD.config, "tie_word_embeddings": True})


def codes(x: Array, scale: Any, largest: int) -> Array:
    """``largest`` 448: e4m3, saturating; 127: int8."""
    if largest == 448:
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return np.clip(np.rint(x / scale), -128, 127) * scale


def by_token(largest: int, ceiling: float = np.inf) -> Round:
    return lambda x: codes(x, np.minimum(np.abs(x).max(1, keepdims=True), ceiling) / largest, largest)


def static(scale: float, largest: int) -> Round:
    return lambda x: codes(x, scale, largest)


def by_group(size: int) -> Round:
    def groups(x: Array) -> Array:
        pieces = [x[:, first : first + size] for first in range(0, x.shape[1], size)]
        return np.concatenate([by_token(448)(piece) for piece in pieces], axis=1)

    return groups


def by_power_of_two(x: Array) -> Array:
    """Of 16 columns, as DeepSeek-V3.1's ``act_quant`` with ``scale_fmt="ue8m0"``."""
    groups = [x[:, first : first + 16] for first in range(0, x.shape[1], 16)]
    scales = [2.0 ** np.ceil(np.log2(np.abs(group).max(1, keepdims=True) / 448)) for group in groups]
    return np.concatenate([codes(*each, 448) for each in zip(groups, scales, strict=True)], axis=1)


def scaled(x: Array) -> Array:
    """By SmoothQuant's factors; those of the weights, which the twin's values have, are divided out."""
    factors = writers.factors(x.shape[1]).astype(np.float64)
    return codes(x * factors, 0.05, 127) / factors


BY_CUT: Mapping[str, Round] = {
    "ct-fp8-channel": by_token(448),
    "ct-fp8-tensor": by_token(448),
    "ct-int8": by_token(127),
    "fbgemm": by_token(448, 1200.0),
    "hf-fp8-wide": by_group(128),  # heads have 32 columns
}
AT_ANY_CUT: Mapping[str, Round] = {
    "ct-fp8-static": static(0.02, 448),
    "ct-int8-static": static(0.03, 127),
    "hf-fp8-blocks": by_group(16),
    "hf-fp8-powers": by_power_of_two,
    "modelopt-fp8": static(0.02, 448),
    "modelopt-smoothquant": scaled,
    "modelopt-mixed-fp8": static(0.02, 448),
}
ROUNDS = {**BY_CUT, **AT_ANY_CUT}


class Definition(Float64Llama):
    """``cuts``: where ranks' columns of output and down projections begin."""

    def __init__(self, twin: Path, name: str, cuts: Mapping[str, Sequence[int]]) -> None:
        super().__init__(twin)
        self._format, self._cuts = name, cuts if name in BY_CUT else {}

    def _project(self, hidden: Array, name: str) -> Array:
        if self._format == "modelopt-mixed-fp8" and "mlp" in name:
            return super()._project(hidden, name)  # weight-only there
        pieces = np.split(hidden, self._cuts.get(name.rpartition(".")[2], ()), axis=1)
        return super()._project(np.concatenate([ROUNDS[self._format](piece) for piece in pieces], axis=1), name)


def column_cuts(path: Path, tp: int) -> dict[str, list[int]]:
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        weights = format_weights(model.weights(model.read_config(checkpoint.config)), checkpoint.formats)
    parts = {weight.spec.owner: weight.spec.parts[0] for weight in weights}
    owners = {"o_proj": "layers.0.output", "down_proj": "layers.0.down"}
    return {name: [parts[owner].span(1, rank, tp).start for rank in range(1, tp)] for name, owner in owners.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_checkpoint(TIED, root / "dense")
    return root


def test_every_format_with_quantised_inputs_is_here() -> None:
    assert ROUNDS.keys() == checkpoints.WITH_INPUTS.keys()


@pytest.mark.parametrize(("tp", "pp"), checkpoints.LAYOUTS)
@pytest.mark.parametrize("name", ROUNDS)
def test_inputs_are_rounded_by_definition_at_every_layout(root: Path, name: str, tp: int, pp: int) -> None:
    """A last bit of an input moves it to the next code here and there: far less than quantisation changes."""
    quantised, twin = checkpoints.written(root, name)
    rows = Definition(twin, name, column_cuts(quantised, tp)).log_probabilities(PROMPT)
    plain = Float64Llama(twin).log_probabilities(PROMPT)
    exact, unrounded = (each[np.arange(len(PROMPT) - 1), PROMPT[1:]] for each in (rows, plain))
    found = checkpoints.logprobs(checkpoints.generate(quantised, tp, pp))
    assert np.abs(found - exact).mean() < 0.05 * np.abs(unrounded - exact).mean()
