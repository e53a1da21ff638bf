# SPDX-License-Identifier: Apache-2.0
"""A model's functions run on shapes alone: what a model uses, before a weight is read or an executor exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model, Pass
from phalanx.runtime.models.declared import check_declaration, check_sources, listed
from phalanx.runtime.models.family_fields import naming
from phalanx.runtime.models.shape_ops import WORDS, Feature, ModelUse, Shape, ShapeOps, state_of
from phalanx.runtime.ops import AttentionSpec

__all__ = ["Feature", "ModelUse", "Shape", "ShapeOps", "use_of"]


def use_of(model: Model, config: ModelConfig) -> ModelUse:
    """What all passes of a model use, over all layers.

    Raises:
        ConfigError: see `ShapeOps`, with the function that is wrong; or a function does not return what it should, a weight
            is not used, a layer's attention is not the one that its family declares, a layer is in no pass or in two; or functions
            of a model file do something else the second time.
    """
    use = _use_of(model, config)
    if model.code and _use_of(model, config) != use:
        raise ConfigError(
            f"{model.architecture}: a second run of its functions differs from the first; they must depend on their arguments alone"
        )
    return use


def _use_of(model: Model, config: ModelConfig) -> ModelUse:
    _check_layers(model, config)
    own, declared = _declarations(model, config)
    ops = ShapeOps(declared)
    for name, each in model.passes.items():
        _run(ops, model, each, config, own[name])
    if (unused := ops.unused) is not None:
        raise ConfigError(f"{model.architecture}: {unused} is declared but not used")
    _check_tables(ops, model, config)
    return ops.use


def _check_tables(ops: ShapeOps, model: Model, config: ModelConfig) -> None:
    for name, rows in ops.tables.items():
        if rows != config.vocab_size:
            raise ConfigError(f"{model.architecture}: {name}.weight has {rows} rows for vocab_size={config.vocab_size}")
    if ops.num_positions < config.max_positions:
        raise ConfigError(
            f"{model.architecture}: a table of {ops.num_positions} positions is too small for max_positions={config.max_positions}"
        )


def _check_layers(model: Model, config: ModelConfig) -> None:
    with naming(model.architecture):
        ranges = [each.layers(config) for each in model.passes.values()]
        if not all(isinstance(layers, range) for layers in ranges):
            raise ConfigError(f"the layers of its passes are {ranges}; layers returns a range")
        if sorted(layer for layers in ranges for layer in layers) != list(range(config.num_layers)):
            raise ConfigError(
                f"the layers of its passes are {ranges}; each of 0 to {config.num_layers - 1} must be in one of them"
            )


_Owners = dict[str | int, frozenset[str]]
"""Names of the weights that each function of a pass declares: ``embed``, ``head``, and a layer's number for its block."""


def _declarations(model: Model, config: ModelConfig) -> tuple[dict[str, _Owners], dict[str, WeightSpec]]:
    """By pass and function, and all of them by name. Several functions may declare the same weight."""
    own: dict[str, _Owners] = {}
    declared: dict[str, WeightSpec] = {}
    with naming(f"{model.architecture}, declaring weights"):
        for name, each in model.passes.items():
            functions: dict[str | int, list[WeightSpec]] = {
                "embed": listed(each.embed_weights(config), "embed_weights"),
                **{layer: listed(each.block_weights(config, layer), "block_weights") for layer in each.layers(config)},
                "head": listed(each.head_weights(config), "head_weights"),
            }
            _check_names(spec.name for layer in each.layers(config) for spec in functions[layer])
            own[name] = {function: frozenset(spec.name for spec in specs) for function, specs in functions.items()}
            for spec in (spec for specs in functions.values() for spec in specs):
                check_declaration(spec)
                if declared.setdefault(spec.name, spec) != spec:
                    raise ConfigError(f"{spec.name} is declared twice")
        check_sources(declared.values())
    return own, declared


def _check_names(names: Iterable[str]) -> None:
    """Formats of quantised weights and the planner know the weights of blocks by their names."""
    for name in names:
        if not name.startswith("layers."):
            raise ConfigError(f"block_weights declares {name!r}; weights of blocks are called layers.<number>.<what>")


def _run(ops: ShapeOps, model: Model, each: Pass[Any], config: ModelConfig, own: _Owners) -> None:
    """One pass, function by function."""
    with naming(f"{model.architecture}, embed"):
        ops.own = own["embed"]
        x = _complete(each.embed(ops, config), "embed")
        ops.end_function(x)
    residual: Shape | None = None
    for layer in each.layers(config):
        with naming(f"{model.architecture}, block of layer {layer}"):
            ops.layer, ops.own, specs = layer, own[layer], each.specs(config, layer)
            start, inputs = len(ops.use.calls), (x, residual)
            x, residual = _outputs(each.block(ops, config, layer, x, residual))
            _check_inputs_read(inputs, (x, residual))
            ops.end_function(x, residual)
            _check_attention(ops, specs, is_checked_to_decode=bool(model.code) and each is model.passes.get("decode"))
            if model.code and inputs[1] is not None:
                _check_first_of_stage(ops.alone(), each, config, inputs[0].width, ops.use.calls[start:])
    with naming(f"{model.architecture}, head"):
        if each.output not in ("logits", "hidden"):
            raise ConfigError(f"output={each.output!r} of the pass is neither 'logits' nor 'hidden'")
        ops.own = own["head"]
        result = each.head(ops, config, x, residual)
        _check_inputs_read((x, residual), (result,))
        if each.output == "logits" and (ops.last_logits is None or result is not ops.last_logits):
            raise ConfigError(f"the head returns {result}, not what logits returns")


def _check_attention(ops: ShapeOps, specs: tuple[Any, ...], *, is_checked_to_decode: bool) -> None:
    """What a block attends with is what its pass declares for the layer, and in the pass that decodes serves one token after another."""
    for name, spec in ops.use.attention.items():
        if name in ops.attended:
            continue
        if spec not in specs:
            raise ConfigError(
                f"{name} is {_difference(spec, specs[0])}, which the family does not declare for this layer"
            )
        if is_checked_to_decode and spec.keys == "own" and not (spec.causal and spec.cached):
            raise ConfigError(
                f"{name} has causal={spec.causal} and cached={spec.cached}, but tokens that follow one another need both"
            )
    ops.attended |= ops.use.attention.keys()


def _check_inputs_read(inputs: tuple[Shape | None, ...], outputs: tuple[Any, ...]) -> None:
    """Both must go on, as a pipeline stage hands over their sum."""
    for name, tensor in zip(("x", "residual"), inputs, strict=True):
        if tensor is not None and not tensor.is_read and not any(tensor is output for output in outputs):
            raise ConfigError(
                f"{name}, which the function before returned, is neither used nor returned; the sum of the two goes on"
            )


def _check_first_of_stage(
    ops: ShapeOps, each: Pass[Any], config: ModelConfig, width: int, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    """A pipeline stage that starts with this layer has no residual, and adds none; all else must be the same."""
    each.block(ops, config, ops.layer or 0, Shape(width), None)
    ops.end_function()
    first, usual = ([call for call in both if call[0] != "add"] for both in (ops.use.calls, calls))
    if first != usual:
        raise ConfigError(
            "run without a residual, as where a pipeline stage starts, it does something else than before; it must depend on its "
            "arguments alone, and on the layer's number, not on whether there is a residual"
        )


def _difference(spec: AttentionSpec, declared: Any) -> str:
    """What an attention has other than the declared one."""
    if not isinstance(declared, AttentionSpec):
        return f"an attention, but the pass's attention returns {declared!r}"
    names = [each.name for each in dataclasses.fields(spec)]
    differing = [name for name in names if getattr(spec, name) != getattr(declared, name)]
    return "attention with " + ", ".join(f"{name}={getattr(spec, name)!r}" for name in differing)


def _outputs(result: Any) -> tuple[Shape, Shape | None]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConfigError(f"a block returns (x, residual), but this is {result}")
    x, residual = result
    return _complete(x, "x"), None if residual is None else _complete(residual, "residual")


def _complete(x: Any, name: str) -> Shape:
    shape = state_of(x, name)
    if shape.kind != "whole":
        raise ConfigError(f"{name} is returned {WORDS[shape.kind]}; it must be whole on every rank")
    shape.is_read = False  # by the next function, which it is for
    return shape
