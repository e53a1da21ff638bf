# SPDX-License-Identifier: Apache-2.0
"""What `launch.quantize` learns from a text: ranges of inputs and caches, and SmoothQuant, AWQ and GPTQ.

Each matrix of these methods is judged on rows that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.kv_scales import attention_module
from phalanx.checkpoints.quantization.numbers import E4M3_MAX
from phalanx.checkpoints.quantization.scheme import Scheme
from phalanx.checkpoints.quantization.writer import Quantized, RoundToNearest, relative_error
from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.calibration.folding import NormFold, awq_factors, fold_into_norm, smoothquant_factors
from phalanx.runtime.calibration.folds import Fold, find_folds
from phalanx.runtime.calibration.gptq import Spread, gptq
from phalanx.runtime.calibration.inputs import ProductInputs
from phalanx.runtime.calibration.layers import LayerRuns
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.models import Model
from phalanx.runtime.models.shapes import use_of

__all__ = ["CACHE_HEADROOM", "CalibratedMethod", "MethodName", "OutputError", "check_method"]

Array = NDArray[Any]
Float32Array = NDArray[np.float32]
MethodName = Literal["rtn", "smoothquant", "awq", "gptq"]

CACHE_HEADROOM = 1.25
"""Ranges of cached keys and values are widened by this: e4m3 loses no precision by it, saturation is what costs."""
_AWQ_STEPS = 20
"""Powers of the inputs' magnitudes that are tried: 0.05 to 0.95."""


def check_method(name: MethodName, scheme: Scheme) -> None:
    """Raise `ConfigError` if the method does not apply to the scheme."""
    if name == "rtn":
        return
    if name == "smoothquant" and scheme.is_weight_only:
        raise ConfigError(
            f"--method=smoothquant does not fit --scheme={scheme.name}, which leaves inputs as they are; use awq, gptq or rtn"
        )
    if name != "smoothquant" and not scheme.is_weight_only:
        raise ConfigError(
            f"--method={name} does not fit --scheme={scheme.name}; use smoothquant or rtn, or w4a16 or w8a16"
        )


@dataclass(frozen=True, slots=True)
class OutputError:
    """Relative error of a product's output on rows that took no part in the calibration.

    Attributes:
        rtn: of rounding to nearest.
        calibrated: of what the method proposes.
        is_kept: whether the proposal was written; rounding to nearest is, where the proposal is no better.
    """

    rtn: float
    calibrated: float
    is_kept: bool

    @property
    def written(self) -> float:
        """That of what was written."""
        return self.calibrated if self.is_kept else self.rtn


@dataclass(slots=True)
class _Layer:
    """What is written for the tensors of one layer, by their stored names."""

    matrices: dict[str, Quantized] = field(default_factory=dict)
    norms: dict[str, Array] = field(default_factory=dict)
    cache_amax: Float32Array = field(default_factory=lambda: np.zeros(2, np.float32))


@dataclass(frozen=True, slots=True)
class _Part:
    """A stored matrix of a product: its name, and its values ``[out, in]``."""

    name: str
    values: Float32Array


class CalibratedMethod:
    """Quantises layer after layer, each by what a text's hidden states are there in the original model.

    Holds one layer at a time: its weights, the statistics of its inputs, and what is to be written of it.

    Args:
        stored: name in the checkpoint of every declared source tensor.
        chosen: the matrices to quantise, by their stored names.
        runs: the calibration text, before the first layer.
        has_cache_scales: write scales of an fp8 cache.

    Attributes:
        output_errors: of each matrix that the method made a proposal for.
        input_ranges: largest magnitude of each matrix's inputs as they were written, for schemes with static inputs.
        cache_scales: by their names in the checkpoint.

    Raises:
        ConfigError: the method does not fit the scheme or the model.
    """

    def __init__(
        self, name: MethodName, scheme: Scheme, model: Model, config: ModelConfig, stored: Mapping[str, str],
        chosen: set[str], runs: LayerRuns, has_cache_scales: bool = False,
    ) -> None:  # fmt: skip
        check_method(name, scheme)
        self._name, self._scheme, self._runs = name, scheme, runs
        self._nearest = RoundToNearest(scheme)
        self._chosen = chosen
        self._specs = [model.weights(config, range(n, n + 1), False, False) for n in range(config.num_layers)]
        self._stored = stored
        if name != "rtn" or scheme.has_static_inputs:
            experts = use_of(model, config).experts
            self._check_seen(spec.owner for specs in self._specs for spec in specs
                             if self._is_chosen(spec) and spec.owner.rpartition(".")[0] in experts)  # fmt: skip
        self._folds = self._find_folds(model, config)
        self._layer_of = {
            stored[part.source]: number for number, specs in enumerate(self._specs) for spec in specs for part in spec.parts
        }  # fmt: skip
        self._cached = {
            stored[spec.parts[0].source] for specs in self._specs for spec in specs
            if has_cache_scales and spec.owner.endswith(".qkv") and spec.kind == "weight"
        }  # fmt: skip
        self._next, self._layer = 0, _Layer()
        self.output_errors: dict[str, OutputError] = {}
        self.input_ranges: dict[str, float] = {}
        self.cache_scales: dict[str, float] = {}

    def _check_seen(self, without_inputs: Iterable[str]) -> None:
        for owner in without_inputs:
            raise ConfigError(
                f"--method={self._name} --scheme={self._scheme.name} has no inputs of {owner}, whose products are not seen one by "
                "one (experts); use --method rtn and a scheme without static inputs"
            )

    def _find_folds(self, model: Model, config: ModelConfig) -> Mapping[str, Fold]:
        """The norms that the method can divide: those that feed chosen matrices alone."""
        if self._name not in ("smoothquant", "awq"):
            return {}
        owners = {spec.owner for specs in self._specs for spec in specs if self._is_chosen(spec)}
        folds = {fold.norm: fold for fold in find_folds(model, config) if owners.issuperset(fold.products)}
        if not folds:
            others = "rtn or gptq" if self._scheme.is_weight_only else "rtn"
            raise ConfigError(
                f"--method={self._name} divides norms with weights that only products read, of which this model has none; use {others}"
            )
        return folds

    def order(self, names: Sequence[str]) -> Sequence[str]:
        return sorted(names, key=lambda name: (self._layer_of.get(name, -1), name))

    def plain(self, name: str, array: Array) -> Array:
        self._advance(name)
        return self._layer.norms.get(name, array)

    def quantize(self, name: str, weight: Array) -> Quantized:
        self._advance(name)
        done = self._layer.matrices.pop(name, None) or self._nearest.quantize(name, weight)
        if not self._scheme.has_static_inputs:
            return done
        return Quantized({**done.tensors, "input_scale": self._scheme.input_scale(self.input_ranges[name])}, done.error)

    def scale_names(self, name: str) -> Sequence[str]:
        if name not in self._cached:
            return ()
        return tuple(f"{attention_module(name)}.{side}_scale" for side in "kv")

    def scales(self, name: str) -> Sequence[Array]:
        names = self.scale_names(name)
        amax = np.maximum(self._layer.cache_amax, np.float32(1e-6))
        scales = np.float32(CACHE_HEADROOM) * amax / np.float32(E4M3_MAX)
        self.cache_scales |= dict(zip(names, scales.tolist(), strict=False))
        return list(scales.reshape(-1, 1)) if names else ()

    def _advance(self, name: str) -> None:
        while self._next <= self._layer_of.get(name, -1):
            self._calibrate(self._next)
            self._next += 1

    def _calibrate(self, number: int) -> None:
        inputs: dict[str, ProductInputs] = {}

        def record(name: str, x: Float32Array) -> None:
            if name not in inputs:
                inputs[name] = ProductInputs(x.shape[1], self._runs.num_tokens, self._name == "gptq")
            inputs[name].add(x)

        run = self._runs.run(number, record)
        weights, self._layer = run.weights, _Layer(cache_amax=run.cache_amax)
        specs = {spec.owner: spec for spec in self._specs[number] if self._is_chosen(spec)}
        if self._name == "rtn" and not self._scheme.has_static_inputs:
            return
        self._check_seen(owner for owner in specs if owner not in inputs)
        for owner, spec in specs.items():
            for part in spec.parts:
                self.input_ranges[self._stored[part.source]] = float(inputs[owner].range.max())
        if self._name == "gptq":
            for owner, spec in specs.items():
                self._round_in_order(_parts(spec, self._stored, weights), inputs[owner])
        elif self._name != "rtn":
            self._smooth_layer(number, specs, weights, inputs)

    def _smooth_layer(
        self, number: int, specs: Mapping[str, WeightSpec], weights: Weights[Float32Array],
        inputs: Mapping[str, ProductInputs],
    ) -> None:  # fmt: skip
        norms: dict[str, dict[str, str]] = {}
        for spec in self._specs[number]:
            if spec.owner in self._folds and len(spec.parts) == 1:
                norms.setdefault(spec.owner, {})[spec.kind] = self._stored[spec.parts[0].source]
        for owner, names in norms.items():
            done = self._smooth(self._folds[owner], names, specs, weights, inputs)
            specs = {owner: each for owner, each in specs.items() if owner not in done}
        for spec in specs.values():
            for part in _parts(spec, self._stored, weights):
                self._keep(part, _rounded(part.values, self._scheme))

    def _is_chosen(self, spec: WeightSpec) -> bool:
        return spec.kind == "weight" and self._stored[spec.parts[0].source] in self._chosen

    def _round_in_order(self, parts: Sequence[_Part], inputs: ProductInputs) -> None:
        assert inputs.gram is not None
        spread = Spread.of(inputs.gram)
        for part in parts:
            nearest = _rounded(part.values, self._scheme)
            codes, scale, values = gptq(part.values, spread, self._scheme)
            proposal = _Rounded(self._scheme.stored(codes, scale), values)
            before, after = (
                _output_error(part.values, inputs.sample, one.values, inputs.sample) for one in (nearest, proposal)
            )
            self.output_errors[part.name] = OutputError(before, after, after < before)
            self._keep(part, proposal if after < before else nearest)

    def _smooth(
        self, fold: Fold, norm: Mapping[str, str], specs: Mapping[str, WeightSpec], weights: Weights[Float32Array],
        inputs: Mapping[str, ProductInputs],
    ) -> set[str]:  # fmt: skip
        """Divide the outputs of a norm, whose tensors are ``norm`` by kind, and multiply the columns that they meet.

        Returns the products that are done.
        """
        parts = [part for owner in fold.products for part in _parts(specs[owner], self._stored, weights)]
        seen, sample = inputs[fold.products[0]], inputs[fold.products[0]].sample
        stored, scheme = {kind: self._runs.stored(name) for kind, name in norm.items()}, self._scheme
        folded = self._chosen_fold(
            parts, seen, lambda wanted: fold_into_norm(stored["weight"], fold.weight_offset, wanted, stored.get("bias"))
        )
        factors, judged = folded.factors, sample[1::2]
        nearest = [_rounded(part.values, scheme) for part in parts]
        smoothed = [_rounded(part.values * factors, scheme) for part in parts]
        ranges = float(seen.range.max()), float((seen.range / factors).max())
        before = _output_errors(parts, judged, nearest, scheme.round_input(judged, ranges[0]))
        after = _output_errors(parts, judged, smoothed, scheme.round_input(judged / factors, ranges[1]))
        is_kept = sum(after) < sum(before)
        for part, *errors in zip(parts, before, after, strict=True):
            self.output_errors[part.name] = OutputError(errors[0], errors[1], is_kept)
            self.input_ranges[part.name] = ranges[is_kept]
        for part, one, two in zip(parts, nearest, smoothed, strict=True):
            self._keep(_Part(part.name, part.values * factors) if is_kept else part, two if is_kept else one)
        if is_kept:
            tensors = {"weight": folded.weight, "bias": folded.bias}
            self._layer.norms |= {name: tensor for kind, name in norm.items() if (tensor := tensors[kind]) is not None}
        return set(fold.products)

    def _chosen_fold(
        self, parts: Sequence[_Part], seen: ProductInputs, folded: Callable[[Float32Array], NormFold]
    ) -> NormFold:
        """The method's only factors, or the best of several on every other row of the sample."""
        largest = np.max([np.abs(part.values).max(axis=0) for part in parts], axis=0)
        if self._name == "smoothquant":
            return folded(smoothquant_factors(seen.amax, largest))
        scheme, rows = self._scheme, seen.sample[::2]
        proposals = [folded(awq_factors(seen.mean, step / _AWQ_STEPS)) for step in range(1, _AWQ_STEPS)]

        def error(proposal: NormFold) -> float:
            rounded = [_rounded(part.values * proposal.factors, scheme) for part in parts]
            return sum(_output_errors(parts, rows, rounded, rows / proposal.factors))

        return min(proposals, key=error)

    def _keep(self, part: _Part, rounded: _Rounded) -> None:
        self._layer.matrices[part.name] = Quantized(
            rounded.tensors, relative_error(rounded.values - part.values, part.values)
        )


@dataclass(frozen=True, slots=True)
class _Rounded:
    tensors: Mapping[str, Array]
    values: Float32Array


def _rounded(values: Float32Array, scheme: Scheme) -> _Rounded:
    return _Rounded(*scheme.quantize(values))


def _parts(spec: WeightSpec, stored: Mapping[str, str], weights: Weights[Float32Array]) -> list[_Part]:
    """The stored matrices of a product, whole: several of its parts may be rows of one (q, k and v of Phi-3).

    Raises:
        ConfigError: one holds rows of another product, too.
    """
    merged = weights.linear(spec.owner).components["weight"]
    ends = np.cumsum([part.shape[0] for part in spec.parts])
    matrices: dict[str, Float32Array] = {}
    missing: dict[str, int] = {}
    for part, piece in zip(spec.parts, np.split(merged, ends[:-1]), strict=True):
        name, rows = stored[part.source], part.source_extents[0]
        whole = matrices.setdefault(name, np.empty((rows, piece.shape[1]), np.float32))
        whole[part.first_row : part.first_row + len(piece)] = piece
        missing[name] = missing.get(name, rows) - len(piece)
    for name in (name for name, rows in missing.items() if rows):
        raise ConfigError(f"{name} holds rows of another product than {spec.owner}, too; use --method rtn")
    return [_Part(name, whole) for name, whole in matrices.items()]


def _output_error(weight: Float32Array, x: Float32Array, values: Float32Array, rounded: Float32Array) -> float:
    exact = x @ weight.T
    return relative_error(rounded @ values.T - exact, exact)


def _output_errors(
    parts: Sequence[_Part], x: Float32Array, rounded: Sequence[_Rounded], seen: Float32Array
) -> list[float]:
    return [_output_error(part.values, x, one.values, seen) for part, one in zip(parts, rounded, strict=True)]
