"""OLMo (Groeneveld et al. 2024) as a model file: Llama with LayerNorms that have no weights, and clipped queries, keys and values.

phalanx check /models/OLMo-7B-hf --model-file examples/olmo.py --against-transformers
"""

from dataclasses import dataclass, fields, replace

from phalanx.models import AttentionSpec, ModelConfig, blocks, built_in

PHALANX_API = 1
LLAMA = built_in("LlamaForCausalLM")
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoConfig(ModelConfig):
    """``clip_qkv``: limit of queries, keys and values; 0 = none. The others are what Llama's declarations ask for."""

    clip_qkv: float
    attention_bias: bool
    mlp_bias: bool = False

    @property
    def output_bias(self):
        return self.attention_bias


def read_fields(reader):
    config = LLAMA.read_fields(reader)
    shared = {each.name: getattr(config, each.name) for each in fields(ModelConfig)}
    changes = {"architecture": "OlmoForCausalLM", "norm_eps": NORM_EPS}
    return OlmoConfig(
        **{**shared, **changes}, clip_qkv=reader.number("clip_qkv", 0.0), attention_bias=config.attention_bias
    )


def block(ops, config, layer, x, residual):
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    qkv = ops.column_linear(x, f"{name}.qkv")
    qkv = ops.clip(qkv, config.clip_qkv) if config.clip_qkv else qkv
    x = ops.attention(qkv, f"{name}.attention", layer, AttentionSpec.of(config))
    x, residual = ops.add_layer_norm(ops.row_linear(x, f"{name}.output"), residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.gated_mlp(ops, name, x, config.activation), residual


def head(ops, config, x, residual):
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x, "lm_head")


def block_weights(config, layer):
    return [spec for spec in LLAMA.decode.block_weights(config, layer) if not spec.owner.endswith("_norm")]


def head_weights(config):
    return [spec for spec in LLAMA.decode.head_weights(config) if spec.owner != "final_norm"]


DECODE = replace(LLAMA.decode, block=block, head=head, block_weights=block_weights, head_weights=head_weights)
MODEL = replace(
    LLAMA,
    architecture="OlmoForCausalLM",
    model_type="olmo",
    other_names=(),
    read_fields=read_fields,
    passes={"decode": DECODE},
)
