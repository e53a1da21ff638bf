"""Mistakes in a model's functions and declarations, planted into Llama: each is one sentence, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from phalanx.runtime.models import blocks, find_model, llama
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.ops import AttentionSpec
from tests.support.checkpoints import CASES_BY_NAME

LLAMA = CASES_BY_NAME["llama-plain"]
Block = Callable[..., Any]


def with_mlp(mlp: Callable[[Any, str, Any], Any]) -> Block:
    """Llama's block with another second half."""

    def block(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
        name = f"layers.{layer}"
        x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", 1e-5)
        x = blocks.attention(ops, name, layer, x, AttentionSpec.of(config))
        x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", 1e-5)
        return mlp(ops, name, x), residual

    return block


def hidden(ops: Any, name: str, x: Any) -> Any:
    return ops.gated_activation(ops.column_linear(x, f"{name}.gate_up"), "silu")


def partial(ops: Any, name: str, x: Any) -> Any:
    return ops.row_linear_partial(hidden(ops, name, x), f"{name}.down")


def without_sum_before_norm(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", 1e-5)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, AttentionSpec.of(config))
    return ops.rms_norm(ops.row_linear_partial(x, f"{name}.output"), f"{name}.mlp_norm", 1e-5), residual


def attends_elsewhere(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    return blocks.attention(ops, f"layers.{layer}", 0, x, AttentionSpec.of(config)), residual


def attends_otherwise(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    spec = replace(AttentionSpec.of(config), window=8)
    return blocks.attention(ops, f"layers.{layer}", layer, x, spec), residual


def whole_sum(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    return ops.all_reduce(x), residual


def twice(config: Any, layer: int) -> list[WeightSpec]:
    return [*llama.block_weights(config, layer), WeightSpec("layers.0.down.weight", (Part("x", (48, 88)),))]


def superfluous(config: Any, layer: int) -> list[WeightSpec]:
    return [*llama.block_weights(config, layer), WeightSpec(f"layers.{layer}.gate.weight", (Part("x", (48,)),))]


def cut_by_outputs(config: Any, layer: int) -> list[WeightSpec]:
    specs = {spec.name: spec for spec in llama.block_weights(config, layer)}
    name = f"layers.{layer}.down.weight"
    (part,) = specs[name].parts
    return [*(specs | {name: replace(specs[name], parts=(replace(part, shard=Shard(0)),))}).values()]


def head_of_plain_rows(config: Any) -> list[WeightSpec]:
    norm, head = llama.head_weights(config)
    return [norm, replace(head, parts=tuple(replace(part, shard=None) for part in head.parts))]


def hidden_head(ops: Any, config: Any, x: Any, residual: Any) -> Any:
    return ops.add_rms_norm(x, residual, "final_norm", 1e-5)[0]


def cut(name: str, shard: Shard | None, bias: tuple[int, ...] = ()) -> Callable[[Any, int], list[WeightSpec]]:
    """Llama's declarations with another share of one weight, or one bias more."""

    def block_weights(config: Any, layer: int) -> list[WeightSpec]:
        specs = {spec.name: spec for spec in llama.block_weights(config, layer)}
        full = f"layers.{layer}.{name}"
        parts = (Part("x", bias),) if bias else specs[full].parts
        specs[full] = WeightSpec(full, tuple(replace(part, shard=shard) for part in parts))
        return [*specs.values()]

    return block_weights


def without_parts(config: Any, layer: int) -> list[WeightSpec]:
    return [*llama.block_weights(config, layer), WeightSpec(f"layers.{layer}.gate.weight", ())]


def given_away(ops: Any, name: str, x: Any) -> Any:
    y = ops.scale(x, 2.0)
    return ops.add(y, x)


def conditional(ops: Any, name: str, x: Any) -> Any:
    return ops.scale(x, 2.0) if x else x


def residual_given_away(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    x, residual = ops.add_rms_norm(x, residual, f"layers.{layer}.attention_norm", 1e-5)
    return ops.add(blocks.attention(ops, f"layers.{layer}", layer, x, AttentionSpec.of(config)), residual), residual


def scaled_logits(ops: Any, config: Any, x: Any, residual: Any) -> Any:
    return ops.scale(llama.head(ops, config, x, residual), 2.0)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "undeclared weight": (
        {"block": with_mlp(lambda ops, name, x: ops.column_linear(x, f"{name}.gate"))},
        "block of layer 0: uses weight 'layers.0.gate.weight', which is not declared",
    ),
    "unused weight": ({"block_weights": superfluous}, "layers.0.gate.weight is declared but not used"),
    "weight declared twice": ({"block_weights": twice}, "declaring weights: layers.0.down.weight is declared twice"),
    "bias on a partial sum": (
        {"block": with_mlp(lambda ops, name, x: ops.all_reduce(ops.add_bias(partial(ops, name, x), f"{name}.down")))},
        "the bias of layers.0.down is added to a partial product, once on each rank; call all_reduce first",
    ),
    "sum of a whole tensor": (
        {"block": whole_sum},
        "all_reduce sums a tensor that is whole on every rank, no partial product; leave it out",
    ),
    "sum of a split tensor": (
        {"block": with_mlp(lambda ops, name, x: ops.all_reduce(hidden(ops, name, x)))},
        "all_reduce sums a tensor that is split over ranks, no partial product; leave it out",
    ),
    "missing all_reduce at the end": (
        {"block": with_mlp(partial)}, "x is returned still to be summed over ranks; it must be whole on every rank",
    ),
    "missing all_reduce before a norm": (
        {"block": without_sum_before_norm},
        "layers.0.mlp_norm takes a tensor that is whole on every rank, but this one is still to be summed over ranks; call "
        "all_reduce (or row_linear)",
    ),
    "sum of unlike tensors": (
        {"block": with_mlp(lambda ops, name, x: ops.add(x, partial(ops, name, x)))},
        "add takes a tensor that is whole on every rank and one that is still to be summed over ranks; sum over ranks first",
    ),
    "wrong width": (
        {"block": with_mlp(lambda ops, name, x: ops.row_linear(ops.column_linear(x, f"{name}.gate_up"), f"{name}.down"))},
        "layers.0.down takes 88 columns, but the tensor has 176",
    ),
    "second matrix of a pair first": (
        {"block": with_mlp(lambda ops, name, x: ops.column_linear(x, f"{name}.down"))},
        "column_linear needs a weight that is split by outputs, but layers.0.down.weight is declared split by inputs",
    ),
    "matrix declared with the wrong axis": (
        {"block_weights": cut_by_outputs},
        "row_linear needs a weight that is split by inputs, but layers.0.down.weight is declared split by outputs",
    ),
    "product of a whole tensor with split inputs": (
        {"block": with_mlp(lambda ops, name, x: ops.row_linear(x, f"{name}.output"))},
        "layers.0.output takes a tensor that is split over ranks, but this one is whole on every rank",
    ),
    "norm of a split tensor": (
        {"block": with_mlp(lambda ops, name, x: ops.rms_norm(ops.column_linear(x, f"{name}.qkv"), f"{name}.mlp_norm", 1e-5))},
        "layers.0.mlp_norm takes a tensor that is whole on every rank, but this one is split over ranks",
    ),
    "cache of another layer": (
        {"block": attends_elsewhere},
        "block of layer 1: layers.1.attention uses the cache of layer 0; pass the layer that the block is called for",
    ),
    "attention other than declared": (
        {"block": attends_otherwise}, "which the family does not declare for this layer",
    ),
    "head that is not split by vocabulary": (
        {"head_weights": head_of_plain_rows},
        "head: lm_head.weight is not split by vocabulary rows; declare it with vocabulary_shard",
    ),
    "head without logits": ({"head": hidden_head}, "not what logits returns"),
    "block that returns one tensor": (
        {"block": lambda ops, config, layer, x, residual: x}, "a block returns (x, residual), but this is Shape(",
    ),
    "tensor used after it was given away": (
        {"block": with_mlp(given_away)},
        "an argument of add is a tensor that scale may have overwritten; go on with what scale returned",
    ),
    "residual returned after it was given away": (
        {"block": residual_given_away}, "residual is a tensor that add may have overwritten; go on with what add returned",
    ),
    "no such activation": (
        {"block": with_mlp(lambda ops, name, x: ops.activation(x, "mish"))},
        "activation knows no 'mish'; it knows silu, gelu_tanh, gelu, relu, relu2",
    ),
    "factor that is no number": (
        {"block": with_mlp(lambda ops, name, x: ops.scale(x, float("nan")))}, "scale has factor=nan, which is not a finite number",
    ),
    "epsilon that is a text": (
        {"block": with_mlp(lambda ops, name, x: ops.rms_norm(x, f"{name}.mlp_norm", "1e-5"))},
        "rms_norm has eps='1e-5', which is not a finite number",
    ),
    "limit below 0": (
        {"block": with_mlp(lambda ops, name, x: ops.clip(x, -1.0))}, "clip has limit=-1.0; it must be above 0",
    ),
    "argument that is no tensor": (
        {"block": with_mlp(lambda ops, name, x: ops.add(x, 1.0))}, "an argument of add is 1.0, not a tensor",
    ),
    "condition on a tensor": (
        {"block": with_mlp(conditional)}, "a condition depends on a tensor, whose values no function sees; decide by the configuration",
    ),
    "norm declared split": (
        {"block_weights": cut("mlp_norm.weight", Shard(0, unit=16))},
        "layers.0.mlp_norm.weight is declared split over ranks, but every rank needs all of it; leave the shard out",
    ),
    "bias of outputs declared whole": (
        {"block_weights": cut("gate_up.bias", None, (176,))},
        "layers.0.gate_up.bias is declared whole on every rank, but what it is added to is split over ranks",
    ),
    "bias after a sum declared split": (
        {"block_weights": cut("down.bias", Shard(0), (48,))},
        "layers.0.down.bias is declared split over ranks, but what it is added to is whole on every rank",
    ),
    "axis that a weight does not have": (
        {"block_weights": cut("down.weight", Shard(2))},
        "declaring weights: layers.0.down.weight is split along axis 2, which model.layers.0.mlp.down_proj.weight of shape (48, 88) lacks",
    ),
    "weight without parts": (
        {"block_weights": without_parts}, "the parts of layers.0.gate.weight are (); give a tuple of at least one Part",
    ),
    "layer in no pass": (
        {"layers": lambda config: range(1, 3)}, "the layers of its passes are [range(1, 3)]; each of 0 to 2 must be in one of them",
    ),
    "logits changed by the head": ({"head": scaled_logits}, "not what logits returns"),
    "output of another kind": ({"output": "tokens"}, "output='tokens' of the pass is neither 'logits' nor 'hidden'"),
    "block that raises": (
        {"block": lambda ops, config, layer, x, residual: config.no_such_field},
        "block of layer 0: AttributeError: 'LlamaConfig' object has no attribute 'no_such_field'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_refused_with_one_sentence(name: str) -> None:
    changes, sentence = MISTAKES[name]
    model = find_model(LLAMA.config)
    planted = replace(model, passes={"decode": replace(model.decode, **changes)})
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        use_of(planted, model.read_config(LLAMA.config))
    assert str(caught.value).startswith("LlamaForCausalLM")
    assert "\n" not in str(caught.value)
