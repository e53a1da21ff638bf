"""Mistakes in a model's functions and declarations, planted into Llama: each is one sentence, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.models import blocks, find_model, llama
from phalanx.runtime.models.base import feed_forward_shard, head_shard, kv_head_shard, vocabulary_shard
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec
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


def declared(*changes: tuple[str, Callable[[Any, str], list[WeightSpec]]]) -> Callable[[Any, int], list[WeightSpec]]:
    """Llama's declarations with others for some names of a layer, made of the configuration and the layer's checkpoint prefix."""

    def block_weights(config: Any, layer: int) -> list[WeightSpec]:
        dropped = tuple(f"layers.{layer}.{name}." for name, _ in changes)
        kept = [spec for spec in llama.block_weights(config, layer) if not spec.name.startswith(dropped)]
        made = [replace(spec, name=f"layers.{layer}.{name}.{spec.name}") for name, make in changes
                for spec in make(config, f"model.layers.{layer}")]  # fmt: skip
        return [*kept, *made]

    return block_weights


def matrix(*parts: Part) -> list[WeightSpec]:
    return [WeightSpec("weight", parts)]


def even_gate_up(config: Any, source: str) -> list[WeightSpec]:
    shape = 2 * config.intermediate_size, config.hidden_size
    return matrix(Part(f"{source}.mlp.gate_up_proj.weight", shape, feed_forward_shard(config, 0)))


def even_qkv(config: Any, source: str) -> list[WeightSpec]:
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return matrix(Part(f"{source}.qkv.weight", (rows, config.hidden_size), Shard(0, unit=config.head_dim)))


def keys_before_queries(config: Any, source: str) -> list[WeightSpec]:
    sizes = (("k", config.num_kv_heads), ("q", config.num_heads), ("v", config.num_kv_heads))
    shards = kv_head_shard(config), head_shard(config, 0), kv_head_shard(config)
    return matrix(
        *(
            Part(f"{source}.{letter}.weight", (heads * config.head_dim, config.hidden_size), shard)
            for (letter, heads), shard in zip(sizes, shards, strict=True)
        )
    )


def rows_of(*firsts: int) -> Callable[[Any, str], list[WeightSpec]]:
    """Gate and up in one tensor, from these rows on."""

    def gate_up(config: Any, source: str) -> list[WeightSpec]:
        f, d, shard = config.intermediate_size, config.hidden_size, feed_forward_shard(config, 0)
        return matrix(*(Part(f"{source}.gu", (f, d), shard, first_row=row, source_rows=2 * f) for row in firsts))

    return gate_up


def norm_of_layer_0(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    x, residual = ops.add_rms_norm(x, residual, "layers.0.attention_norm", 1e-5)
    return blocks.attention(ops, f"layers.{layer}", layer, x, AttentionSpec.of(config)), residual


def residual_forgotten(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    return llama.block(ops, config, layer, x, None)


def scaled_at_the_start(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    return llama.block(ops, config, layer, ops.scale(x, 2.0) if residual is None else x, residual)


def with_tensor_of_embed() -> dict[str, Any]:
    """Llama whose blocks add rows of the embedding that they were not given."""
    kept: list[Any] = []

    def embed(ops: Any, config: Any) -> Any:
        kept[:] = [ops.embedding("embed")]
        return ops.rms_norm(kept[0], "embed_norm", 1e-5)

    def block(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
        x = ops.add(x, ops.rms_norm(kept[0], f"layers.{layer}.skip_norm", 1e-5))
        return llama.block(ops, config, layer, x, residual)

    def norm(name: str, config: Any) -> WeightSpec:
        return WeightSpec(f"{name}.weight", (Part(name, (config.hidden_size,)),))

    return {
        "embed": embed, "block": block, "embed_weights": lambda config: [*llama.embed_weights(config), norm("embed_norm", config)],
        "block_weights": lambda config, layer: [*llama.block_weights(config, layer), norm(f"layers.{layer}.skip_norm", config)],
    }  # fmt: skip


def attends_twice(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
    for _ in range(2):
        x = blocks.attention(ops, f"layers.{layer}", layer, x, AttentionSpec.of(config))
    return x, residual


def mixture(ops: Any, name: str, x: Any) -> Any:
    return ops.all_reduce(ops.experts(x, f"{name}.experts", ExpertsSpec(2, 1, "silu")))


def experts(shard: Callable[[Any, int], Shard | None], fused: bool = False) -> Callable[[Any, int], list[WeightSpec]]:
    def make(config: Any, source: str) -> list[WeightSpec]:
        f, d = config.intermediate_size, config.hidden_size
        kinds = (("gate_up", 2 * f),) if fused else (("gate", f), ("up", f))
        ups = (Part(f"{source}.{e}.{kind}", (rows, d), shard(config, 0)) for e in range(2) for kind, rows in kinds)
        downs = (Part(f"{source}.{e}.down", (d, f), shard(config, 1)) for e in range(2))
        return [WeightSpec("router.weight", (Part(f"{source}.router", (2, d)),)),
                WeightSpec("gate_up.weight", tuple(ups)), WeightSpec("down.weight", tuple(downs))]  # fmt: skip

    return declared(("experts", make), ("gate_up", lambda config, source: []), ("down", lambda config, source: []))


def with_attention(**fields: Any) -> dict[str, Any]:
    """Llama with other fields of attention, or what functions make of its own."""

    def attention(config: Any, layer: int) -> AttentionSpec:
        spec = AttentionSpec.of(config)
        values = {name: field(getattr(spec, name)) if callable(field) else field for name, field in fields.items()}
        return replace(spec, **values)

    def block(ops: Any, config: Any, layer: int, x: Any, residual: Any) -> Any:
        return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))

    return {"attention": attention, "block": block}


def head_norms(shard: Shard | None, rows: tuple[int, ...]) -> Callable[[Any, int], list[WeightSpec]]:
    parts = [(f"attention.{side}_norm", lambda config, source: matrix(Part(source, (*rows, config.head_dim), shard)))
             for side in ("query", "key")]  # fmt: skip
    return declared(*parts)


def shorter_head(config: Any) -> list[WeightSpec]:
    norm, head = llama.head_weights(config)
    shape = config.vocab_size - 1, config.hidden_size
    return [norm, replace(head, parts=(Part("lm_head.weight", shape, vocabulary_shard()),))]


def otherwise_called(config: Any, layer: int) -> list[WeightSpec]:
    return [replace(spec, name=f"group.{spec.name}") for spec in llama.block_weights(config, layer)]


def few_positions(config: Any) -> list[WeightSpec]:
    return [*llama.embed_weights(config), WeightSpec("positions.weight", (Part("p", (8, config.hidden_size)),))]


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
    "gate and up cut as one matrix": (
        {"block_weights": declared(("gate_up", even_gate_up))},
        "gated_activation takes gate and up as two parts that ranks divide alike, which these 176 columns are not, being one part; "
        "declare them with declarations.gate_up or stacked_gate_up",
    ),
    "queries, keys and values cut as one matrix": (
        {"block_weights": declared(("qkv", even_qkv))},
        "layers.0.attention takes queries, keys and values as parts that ranks divide by heads, but these are divided otherwise, 48 + "
        "48 + 48 columns against 144 columns; declare them with declarations.qkv, stacked_qkv or fused_qkv",
    ),
    "keys before queries": (
        {"block_weights": declared(("qkv", keys_before_queries)), "config": {"num_key_value_heads": 2}},
        "but these are divided otherwise, 48 + 24 + 24 columns against 24 + 48 + 24 columns",
    ),
    "output of attention divided in other units": (
        {"block_weights": cut("output.weight", Shard(1))},
        "layers.0.output divides its inputs over ranks otherwise than the tensor's columns are divided, from tp_size=3 on; declare both "
        "alike (head_shard for heads, feed_forward_shard)",
    ),
    "down divided in other units than up": (
        {"block_weights": cut("down.weight", Shard(1))}, "layers.0.down divides its inputs over ranks otherwise",
    ),
    "bias divided in other units": (
        {"block_weights": cut("gate_up.bias", Shard(0), (176,))},
        "layers.0.gate_up.bias is divided otherwise than what it is added to, 88 + 88 columns against 176 columns; declare both alike",
    ),
    "parts split along different axes": (
        {"block_weights": declared(("gate_up", lambda config, source: matrix(Part("a", (88, 48), Shard(0)), Part("b", (88, 48), Shard(1)))))},
        "the parts of layers.0.gate_up.weight are split along different axes; split all of them alike",
    ),
    "experts that every rank holds": (
        {"block": with_mlp(mixture), "block_weights": experts(lambda config, axis: None)},
        "gate, up and down of expert 0 of layers.0.experts are not divided over ranks alike; use declarations.experts",
    ),
    "experts whose halves are one part": (
        {"block": with_mlp(mixture), "block_weights": experts(feed_forward_shard, fused=True)},
        "layers.0.experts takes gate and up, and down, of 2 experts as 4 and 2 parts, but 2 and 2 are declared; use declarations.experts",
    ),
    "own norms of heads on every rank": (
        {**with_attention(head_norm=HeadNorm(1e-5, own_weights=True)), "block_weights": head_norms(None, (4,))},
        "layers.0.attention.query_norm.weight is not divided over ranks as its heads are, 4 columns against none; declare it with "
        "head_shard or kv_head_shard",
    ),
    "one norm of all heads declared split": (
        {**with_attention(head_norm=HeadNorm(1e-5)), "block_weights": head_norms(Shard(0), ())},
        "layers.0.attention.query_norm.weight is not divided over ranks as its heads are, none against 12 columns; declare it with no shard",
    ),
    "weight of another layer": (
        {"block": norm_of_layer_0},
        "block of layer 1: uses weight 'layers.0.attention_norm.weight', which is declared elsewhere only, so that another pipeline stage "
        "may hold it; declare it for this function, too",
    ),
    "residual that is not passed on": (
        {"block": residual_forgotten},
        "block of layer 1: residual, which the function before returned, is neither used nor returned; the sum of the two goes on",
    ),
    "residual that the head forgets": (
        {"head": lambda ops, config, x, residual: llama.head(ops, config, x, None)},
        "head: residual, which the function before returned, is neither used nor returned",
    ),
    "other work at the start of a stage": (
        {"block": scaled_at_the_start},
        "block of layer 1: run without a residual, as where a pipeline stage starts, it does something else than before",
    ),
    "tensor of another function": (
        with_tensor_of_embed(),
        "block of layer 0: an argument of rms_norm is a tensor that another function made and did not return; the next function may run on "
        "another pipeline stage, which is handed x and residual alone",
    ),
    "two attentions in a layer": (
        {"block": attends_twice},
        "layers.0.attention uses the cache of layer 0 a second time; a layer has one attention",
    ),
    "attention to later tokens": (
        with_attention(causal=False), "layers.0.attention has causal=False and cached=True, but tokens that follow one another need both",
    ),
    "window below 0": (with_attention(window=-4), "window=-4 of an attention is not a Python int of at least 0"),
    "window that is no whole number": (with_attention(window=4.0), "window=4.0 of an attention is not a Python int of at least 0"),
    "cap below 0": (with_attention(soft_cap=-5.0), "soft_cap=-5.0 of an attention is not a finite Python number of at least 0; 0 = off"),
    "scale that is a text": (with_attention(scale="0.1"), "scale='0.1' of an attention is not a finite Python number above 0"),
    "scale below 0": (with_attention(scale=-1.0), "scale=-1.0 of an attention is not a finite Python number above 0"),
    "scale of 0": (with_attention(scale=0), "scale=0 of an attention is not a finite Python number above 0"),
    "scale of NumPy": (
        with_attention(scale=np.float32(0.25)), f"scale={np.float32(0.25)!r} of an attention is not a finite Python number above 0",
    ),
    "heads counted by NumPy": (
        with_attention(num_heads=np.int64(4)), f"num_heads={np.int64(4)!r} of an attention is not a Python int of at least 1",
    ),
    "slopes in a list": (
        with_attention(alibi_slopes=[0.5] * 4), "alibi_slopes=[0.5, 0.5, 0.5, 0.5] of an attention is not a tuple of finite Python numbers",
    ),
    "rows beyond a tensor": (
        {"block_weights": declared(("gate_up", rows_of(0, 96)))},
        "declaring weights: rows 96 to 184 of model.layers.0.gu are declared, which has 176 rows; correct first_row, shape or source_rows",
    ),
    "rows that no weight takes": (
        {"block_weights": declared(("gate_up", rows_of(0, 0)))},
        "no weight takes the rows from 88 on of model.layers.0.gu, which has 176; declare a part for them",
    ),
    "unit that does not divide": (
        {"block_weights": cut("gate_up.weight", Shard(0, unit=16, what="units of 16"))},
        "model.layers.0.mlp.gate_proj.weight of shape (88, 48) in layers.0.gate_up.weight is no multiple of the unit 16 (units of 16) along "
        "axis 0",
    ),
    "parts of different widths": (
        {"block_weights": declared(("gate_up", lambda config, source: matrix(Part("a", (88, 48)), Part("b", (88, 47)))))},
        "layers.0.gate_up.weight is made of parts of shapes (88, 48) and (88, 47); they may differ in their rows only",
    ),
    "rotary scaling that does not exist": (
        with_attention(rope=lambda rope: replace(rope, scaling="ntk")),
        "scaling='ntk' of a rotary embedding is none of default, linear, llama3, yarn, longrope",
    ),
    "base below 0": (
        with_attention(rope=lambda rope: replace(rope, theta=-1.0)), "theta=-1.0 of a rotary embedding is not a finite Python number above 0",
    ),
    "base of NumPy": (
        with_attention(rope=lambda rope: replace(rope, theta=np.float32(1e4))),
        f"theta={np.float32(1e4)!r} of a rotary embedding is not a finite Python number above 0",
    ),
    "rotated channels of NumPy": (
        with_attention(rope=lambda rope: replace(rope, rotary_dim=np.int64(12))),
        f"rotary_dim={np.int64(12)!r} of a rotary embedding is not a Python int",
    ),
    "long factors for fewer pairs": (
        with_attention(rope=lambda rope: replace(rope, scaling="longrope", short_factors=(1.0,), long_factors=(2.0,))),
        "short_factors and long_factors of a rotary embedding have 1 and 1 numbers for rotary_dim=12; give one for each pair",
    ),
    "norm of heads of no kind": (
        with_attention(head_norm=lambda _: HeadNorm(1e-5, kind="rmsnorm")),  # type: ignore[arg-type]
        "kind='rmsnorm' of a norm of heads is neither 'rms' nor 'layer'",
    ),
    "tokens that take no expert": (
        {"block": with_mlp(lambda ops, name, x: ops.experts(x, name, ExpertsSpec(2, 0, "silu")))},
        "top_k=0 of a mixture of experts is not a Python int of at least 1",
    ),
    "experts without such an activation": (
        {"block": with_mlp(lambda ops, name, x: ops.experts(x, name, ExpertsSpec(2, 1, "swiglu")))},  # type: ignore[arg-type]
        "activation='swiglu' of experts is none of silu, gelu_tanh, gelu, relu, relu2",
    ),
    "declarations that can be read once": (
        {"block_weights": lambda config, layer: iter(llama.block_weights(config, layer))},
        "declaring weights: block_weights returns list_iterator, not a list of WeightSpec",
    ),
    "shape that is no whole number": (
        {"block_weights": declared(("down", lambda config, source: matrix(Part("d", (48, 88.0), Shard(1)))))},  # type: ignore[arg-type]
        "d in layers.0.down.weight has shape=(48, 88.0); give whole numbers above 0",
    ),
    "aliases that are one text": (
        {"block_weights": declared(("down", lambda config, source: matrix(Part("d", (48, 88), Shard(1), "old")))) },  # type: ignore[arg-type]
        "a part of layers.0.down.weight has source='d' and aliases='old'; give a text and a tuple of texts",
    ),
    "weights of blocks called otherwise": (
        {"block_weights": otherwise_called},
        "block_weights declares 'group.layers.0.attention_norm.weight'; weights of blocks are called layers.<number>.<what>",
    ),
    "head of another vocabulary": ({"head_weights": shorter_head}, "lm_head.weight has 100 rows for vocab_size=101"),
    "too few positions": (
        {"embed": lambda ops, config: ops.position_embedding(llama.embed(ops, config), "positions"), "embed_weights": few_positions},
        "a table of 8 positions is too small for max_positions=128",
    ),
    "block that raises": (
        {"block": lambda ops, config, layer, x, residual: config.no_such_field},
        "block of layer 0: AttributeError: 'LlamaConfig' object has no attribute 'no_such_field'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_refused_with_one_sentence(name: str) -> None:
    changes, sentence = MISTAKES[name]
    fields = {**LLAMA.config, **changes.get("config", {})}
    model = find_model(fields)
    planted = replace(
        model,
        code="of a file",
        passes={"decode": replace(model.decode, **{key: each for key, each in changes.items() if key != "config"})},
    )
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        use_of(planted, model.read_config(fields))
    assert str(caught.value).startswith("LlamaForCausalLM")
    assert "\n" not in str(caught.value)
