"""Arcee's AFM as a model file: Llama whose feed-forward part has no gate, with squared ReLU.

mpirun -n 4 phalanx serve /models/AFM-4.5B --model-file examples/arcee.py --tp 2 --pp 2
phalanx check /models/AFM-4.5B --model-file examples/arcee.py --against-transformers
"""

from dataclasses import replace

from phalanx.models import AttentionSpec, blocks, built_in, declarations, feed_forward_shard

PHALANX_API = 1
LLAMA = built_in("LlamaForCausalLM")


def read_fields(reader):
    config = LLAMA.read_fields(reader)
    activation = reader.activation("hidden_act", "relu2")
    return replace(
        config, architecture="ArceeForCausalLM", activation=activation, norm_eps=reader.number("rms_norm_eps", 1e-5)
    )


def block(ops, config, layer, x, residual):
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, AttentionSpec.of(config))
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def block_weights(config, layer):
    name, source, shape = f"layers.{layer}", f"model.layers.{layer}.mlp", (config.intermediate_size, config.hidden_size)
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    kept = [
        spec
        for spec in LLAMA.decode.block_weights(config, layer)
        if ".gate_up." not in spec.name and ".down." not in spec.name
    ]
    return [
        *kept,
        *declarations.column_linear(f"{name}.up", f"{source}.up_proj", shape, columns, config.mlp_bias),
        *declarations.row_linear(f"{name}.down", f"{source}.down_proj", shape[::-1], rows, config.mlp_bias),
    ]


DECODE = replace(LLAMA.decode, block=block, block_weights=block_weights)
MODEL = replace(
    LLAMA,
    architecture="ArceeForCausalLM",
    model_type="arcee",
    other_names=(),
    read_fields=read_fields,
    passes={"decode": DECODE},
)
