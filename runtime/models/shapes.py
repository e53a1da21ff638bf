"""A model's functions run on shapes alone: what a model uses, before a weight is read or an executor exists."""

from __future__ import annotations

import dataclasses
from typing import Any

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model, Pass
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
    ops = ShapeOps(_declarations(model, config))
    for each in model.passes.values():
        _run(ops, model, each, config)
    if (unused := ops.unused) is not None:
        raise ConfigError(f"{model.architecture}: {unused} is declared but not used")
    return ops.use


def _check_layers(model: Model, config: ModelConfig) -> None:
    with naming(model.architecture):
        ranges = [each.layers(config) for each in model.passes.values()]
        if not all(isinstance(layers, range) for layers in ranges):
            raise ConfigError(f"the layers of its passes are {ranges}; layers returns a range")
        if sorted(layer for layers in ranges for layer in layers) != list(range(config.num_layers)):
            raise ConfigError(
                f"the layers of its passes are {ranges}; each of 0 to {config.num_layers - 1} must be in one of them"
            )


def _declarations(model: Model, config: ModelConfig) -> dict[str, WeightSpec]:
    declared: dict[str, WeightSpec] = {}
    with naming(f"{model.architecture}, declaring weights"):
        for spec in model.weights(config):
            _check_declaration(spec)
            if spec.name in declared:
                raise ConfigError(f"{spec.name} is declared twice")
            declared[spec.name] = spec
    return declared


def _check_declaration(spec: Any) -> None:
    if not isinstance(spec, WeightSpec):
        raise ConfigError(f"{spec!r} is not a WeightSpec")
    if not spec.owner:
        raise ConfigError(f"{spec.name!r} says not what it is; add .weight or .bias to the name")
    if not isinstance(spec.parts, tuple) or not spec.parts or not all(isinstance(part, Part) for part in spec.parts):
        raise ConfigError(f"the parts of {spec.name} are {spec.parts!r}; give a tuple of at least one Part")
    for part in spec.parts:
        if part.shard is not None and not 0 <= part.shard.axis < len(part.shape):
            raise ConfigError(
                f"{spec.name} is split along axis {part.shard.axis}, which {part.source} of shape {part.shape} lacks"
            )


def _run(ops: ShapeOps, model: Model, each: Pass[Any], config: ModelConfig) -> None:
    """One pass, function by function."""
    with naming(f"{model.architecture}, embed"):
        x = _complete(each.embed(ops, config), "embed")
    residual: Shape | None = None
    for layer in each.layers(config):
        with naming(f"{model.architecture}, block of layer {layer}"):
            ops.layer, specs = layer, each.specs(config, layer)
            x, residual = _outputs(each.block(ops, config, layer, x, residual))
            for name, spec in ops.use.attention.items():
                if spec not in specs and name not in ops.attended:
                    raise ConfigError(
                        f"{name} is {_difference(spec, specs[0])}, which the family does not declare for this layer"
                    )
            ops.attended |= ops.use.attention.keys()
    with naming(f"{model.architecture}, head"):
        if each.output not in ("logits", "hidden"):
            raise ConfigError(f"output={each.output!r} of the pass is neither 'logits' nor 'hidden'")
        result = each.head(ops, config, x, residual)
        if each.output == "logits" and (ops.last_logits is None or result is not ops.last_logits):
            raise ConfigError(f"the head returns {result}, not what logits returns")


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
    return shape
