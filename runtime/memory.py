# SPDX-License-Identifier: Apache-2.0
"""How much memory a rank takes, from ``config.json`` alone: the arithmetic that the planner prints and the executors allocate by.

Weights and the key/value cache are exact. The workspace is what the CUDA executor sets aside: an upper bound of the activations
of its largest step. What libraries and captured graphs take comes out of `RESERVE_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from phalanx.checkpoints.formats import ALL_DENSE, Format, FormatPlan, FormattedWeight, format_weights
from phalanx.checkpoints.item_sizes import ITEM_SIZES
from phalanx.checkpoints.quantization.held import HeldValues, PackedCodes, has_blocks, whole_blocks
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.spec import WeightSpec, distinct
from phalanx.kernels.all_reduce_sizes import MOST_RANKS, exchange_bytes
from phalanx.kernels.product_sizes import SUM_BYTES, block_scale_shape, packed_row_bytes, padded_tokens, unpacked_bytes
from phalanx.parallel.sharding import local_kv_heads
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.attention import AttentionSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model, vocabulary_shard
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.ops import ExpertsSpec
from phalanx.runtime.state_sizes import fp8_scale_bytes, state_bytes

__all__ = [
    "ADJUSTED_ROWS",
    "DTYPE_BYTES",
    "LOGIT_ROWS",
    "RESERVE_BYTES",
    "WEIGHT_PARTS",
    "RankMemory",
    "activation_bytes",
    "communication_bytes",
    "kv_block_bytes",
    "num_kv_blocks",
    "plan_memory",
    "weight_bytes",
    "workspace_bytes",
]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
WEIGHT_PARTS = ("embedding", "attention", "mlp", "norms", "head")

LOGIT_ROWS = 256
"""Rows of logits that are scored, or gathered from all tensor-parallel ranks, at once; bounds memory at large vocabularies."""

ADJUSTED_ROWS = 32
"""Rows whose logits are copied at once for token biases and penalties; in float32, and gathered like others."""

TOKEN_ID_BYTES = 4
"""Of each position in the cache, for the tokens themselves, which penalties count."""

RESERVE_BYTES = 1 << 30
"""Left free on a GPU for captured graphs and for what libraries allocate late."""

ALIGNMENT_BYTES = 256
_ROUTING_WORDS = 10  # 16-bit: id, share, place in the order and its inverse, tiles


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank takes before any cache, and what one block of the cache adds.

    Attributes:
        weights: by `WEIGHT_PARTS`; tied tensors count once.
        workspace: activations of the largest step, logits included, the state of the batch, and scales of an fp8 cache.
        communication: buffers for the hidden states that come from the stage before, and for the all-reduce among
            tensor-parallel ranks of one host.
        kv_block_bytes: one block over all layers of the stage: keys, values and token ids.
    """

    rank: int
    stage: int
    tp_rank: int
    layers: range
    weights: Mapping[str, int]
    workspace: int
    communication: int
    kv_block_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    @property
    def fixed_bytes(self) -> int:
        """All but the cache."""
        return self.weight_bytes + self.workspace + self.communication


def plan_memory(
    model: Model,
    config: ModelConfig,
    layout: Layout,
    dtype: str,
    *,
    formats: FormatPlan = ALL_DENSE,
    kv_itemsize: int | None = None,
    max_num_seqs: int,
    max_num_tokens: int,
    max_model_len: int,
    block_size: int,
) -> tuple[RankMemory, ...]:
    """Every rank of one replica, in order. ``kv_itemsize``: bytes of a cached value; None = those of ``dtype``.

    Raises:
        ConfigError: the model cannot be split so.
    """
    itemsize, experts = DTYPE_BYTES[dtype], use_of(model, config).experts
    state = state_bytes(max_num_seqs, max_num_tokens, -(-max_model_len // block_size), block_size, config.vocab_size)
    result = []
    for stage, layers in enumerate(model.stages(config, layout.pp)):
        # One after the other: a tp that the model cannot be split by is refused with the first, however large it is.
        places = (Topology(layout, stage * layout.tp + tp_rank) for tp_rank in range(layout.tp))
        specs = model.weights(config, layers, stage == 0, stage == layout.pp - 1)
        attention = [model.decode.attention(config, layer) for layer in layers]
        weights = format_weights(specs, formats)
        held = {weight.spec.name: weight for weight in weights}
        names = ([spec.name for spec in model.decode.block_weights(config, layer)] for layer in layers)
        blocks = [[held[name] for name in own if name in held] for own in names]  # an encoder's have other names
        workspace = partial(
            _largest_step,
            blocks,
            config,
            experts,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            itemsize=itemsize,
        )
        result += [
            RankMemory(
                rank=place.rank,
                stage=stage,
                tp_rank=place.tp_rank,
                layers=layers,
                weights=weight_bytes(weights, place.tp_rank, layout.tp, itemsize),
                workspace=workspace(place) + state + (_fp8_scales(attention, place) if kv_itemsize == 1 else 0),
                communication=communication_bytes(config, place, max_num_tokens, itemsize),
                kv_block_bytes=kv_block_bytes(attention, place.tp_rank, layout.tp, block_size, kv_itemsize or itemsize),
            )
            for place in places
        ]
    return tuple(result)


def communication_bytes(config: ModelConfig, place: Topology, max_num_tokens: int, itemsize: int) -> int:
    """Return the size of one rank's buffers for sums and hidden rows.

    More ranks than `MOST_RANKS`, or several hosts, sum by NCCL and need no buffers of ours.
    """
    tp = place.layout.tp
    hidden = 0 if place.is_first_stage else max_num_tokens * config.hidden_size * itemsize
    return hidden + (exchange_bytes(tp) if 1 < tp <= MOST_RANKS else 0)


def num_kv_blocks(ranks: Sequence[RankMemory], memory_bytes: int) -> int:
    """Blocks that fit into ``memory_bytes`` of every rank; all ranks hold the same number. 0 if nothing fits."""
    return max(0, min((memory_bytes - rank.fixed_bytes) // rank.kv_block_bytes for rank in ranks))


def weight_bytes(weights: Sequence[FormattedWeight], tp_rank: int, tp_size: int, itemsize: int) -> dict[str, int]:
    """Bytes of a rank's weights by `WEIGHT_PARTS`, padding included; data under two names counts at its first.

    ``itemsize`` is that of the compute type; components that declare a format count in that.
    """
    result = dict.fromkeys(WEIGHT_PARTS, 0)
    held = {component.name: weight.format for weight in weights for component in weight.components}
    for group in distinct(component for weight in weights for component in weight.components):
        spec = group[0]
        result[_weight_part(spec.owner)] += _component_bytes(spec, held[spec.name], tp_rank, tp_size, itemsize)
    return result


def _component_bytes(spec: WeightSpec, held: Format, rank: int, size: int, itemsize: int) -> int:
    shape = spec.local_shape(rank, size)
    if not (isinstance(held, PackedCodes) and spec.kind == "codes"):
        return math.prod(shape) * (itemsize if spec.dtype is None else ITEM_SIZES[spec.dtype])
    needs_scales = has_blocks(held) and whole_blocks(spec.parts, rank, size)
    scales = math.prod(block_scale_shape(*shape)) * DTYPE_BYTES["float32"] if needs_scales else 0
    return shape[0] * packed_row_bytes(shape[1], held.kind) + scales


def kv_block_bytes(specs: Iterable[AttentionSpec], tp_rank: int, tp_size: int, block_size: int, itemsize: int) -> int:
    """Bytes of one block of the cache: ids of ``block_size`` tokens, their keys and values of local heads in layers of ``specs``."""
    widths = (local_kv_heads(spec.num_kv_heads, tp_rank, tp_size).size * spec.head_dim for spec in specs if spec.cached)
    return (2 * sum(widths) * itemsize + TOKEN_ID_BYTES) * block_size


def workspace_bytes(
    model: Model,
    config: ModelConfig,
    formats: FormatPlan,
    place: Topology,
    max_num_seqs: int,
    max_num_tokens: int,
    itemsize: int,
    experts: Mapping[str, ExpertsSpec] | None = None,
) -> int:
    """Room for the activations and logits of the largest step on one rank, by its largest layer; see `activation_bytes`.

    ``experts``: those of the model by name, if they are known.
    """
    layers = model.stages(config, place.layout.pp)[place.stage]
    blocks = [format_weights(model.decode.block_weights(config, layer), formats) for layer in layers]
    mixtures = use_of(model, config).experts if experts is None else experts
    return _largest_step(blocks, config, mixtures, place, max_num_seqs, max_num_tokens, itemsize)


def _largest_step(
    blocks: Sequence[Sequence[FormattedWeight]],
    config: ModelConfig,
    experts: Mapping[str, ExpertsSpec],
    place: Topology,
    max_num_seqs: int,
    max_num_tokens: int,
    itemsize: int,
) -> int:
    """``blocks``: weights of each of the stage's layers."""
    tp = place.tp_rank, place.layout.tp
    logit_rows = max(max_num_seqs, LOGIT_ROWS) if place.is_last_stage else 0
    if tp[1] > 1:
        logit_rows += LOGIT_ROWS * tp[1]
    if place.is_last_stage:
        logit_rows += -(-ADJUSTED_ROWS * (1 + (tp[1] if tp[1] > 1 else 0)) * DTYPE_BYTES["float32"] // itemsize)
    vocab_rows = vocabulary_shard().span(config.vocab_size, *tp).size

    def of_layer(weights: Sequence[FormattedWeight]) -> int:
        specs = [weight.spec for weight in weights]
        quantized = [weight.spec for weight in weights if isinstance(weight.format, RowCodes)]
        activations = activation_bytes(
            specs, experts, config.hidden_size, vocab_rows, max_num_tokens, logit_rows, itemsize, *tp
        )
        rounded = [weight.spec for weight in weights if _rounds_inputs(weight.format)]
        num_rows = max_num_tokens + logit_rows
        inputs = _code_bytes(quantized, num_rows, *tp) + _rounded_bytes(rounded, experts, num_rows, itemsize, *tp)
        with_blocks = [weight.spec for weight in weights if has_blocks(weight.format)]
        return activations + inputs + _added_bytes(with_blocks, itemsize, *tp) + _product_bytes(weights, itemsize, *tp)

    return max(map(of_layer, blocks))


def activation_bytes(
    block_specs: Iterable[WeightSpec],
    experts: Mapping[str, ExpertsSpec],
    hidden_size: int,
    vocab_rows: int,
    num_tokens: int,
    num_logit_rows: int,
    itemsize: int,
    rank: int,
    size: int,
) -> int:
    """Room for one step: every matrix of a block with its input and output alive at once, the residual stream, the logits.

    An upper bound: a block never holds all of them together. Rows that need logits count twice, because the last block goes
    on with them alone. A token passes through the ``top_k`` experts that it takes, of those of the layer: ``experts`` says by
    name which matrices are a stack of them. ``vocab_rows`` is V local; ``rank`` of ``size`` is the place in the
    tensor-parallel group.
    """
    matrices = [_row_widths(spec, experts, rank, size) for spec in block_specs if len(spec.parts[0].shape) == 2]
    per_token = sum(out + inner for out, inner in matrices) + 4 * hidden_size
    pieces = 6 * len(matrices) + 32
    logits = num_logit_rows * (vocab_rows + hidden_size)
    return ((num_tokens + num_logit_rows) * per_token + logits) * itemsize + pieces * ALIGNMENT_BYTES


def _row_widths(spec: WeightSpec, experts: Mapping[str, ExpertsSpec], rank: int, size: int) -> tuple[int, int]:
    """Values that a token has after and before a product; routing words count as values."""
    out, inner = spec.local_shape(rank, size)
    owner, _, matrix = spec.owner.rpartition(".")
    if owner not in experts:
        return out, inner
    mixture = experts[owner]
    if matrix == "router":
        return 2 * mixture.num_experts, _ROUTING_WORDS * mixture.top_k
    if matrix == "gate_up":
        return 0, inner  # what comes out of it, gated, is the input of `down`
    return mixture.top_k * spec.parts[0].shape[0], mixture.top_k * inner


def _code_bytes(specs: Iterable[WeightSpec], num_rows: int, rank: int, size: int) -> int:
    """Room for the 8-bit inputs of ``specs`` with a scale for each row, all alive at once."""
    widths = [spec.local_shape(rank, size)[1] for spec in specs]
    return sum(num_rows * (width + 4) + 4 * ALIGNMENT_BYTES for width in widths)


def _rounds_inputs(chosen: Format) -> bool:
    if isinstance(chosen, PackedCodes):
        return chosen.rounds_inputs
    if isinstance(chosen, HeldValues):
        return True
    return isinstance(chosen, RowCodes) and bool(chosen.prescale)


def _rounded_bytes(
    specs: Iterable[WeightSpec], experts: Mapping[str, ExpertsSpec], num_rows: int, itemsize: int, rank: int, size: int
) -> int:
    """Room for inputs of ``specs`` that are rounded before the product, all alive at once."""
    widths = [_input_width(spec, experts, rank, size) for spec in specs]
    return sum(num_rows * width * itemsize + ALIGNMENT_BYTES for width in widths)


def _input_width(spec: WeightSpec, experts: Mapping[str, ExpertsSpec], rank: int, size: int) -> int:
    """Values of a token that a product takes: the last product of experts has a row for each expert that the token takes."""
    inner = spec.local_shape(rank, size)[1]
    owner, _, matrix = spec.owner.rpartition(".")
    return experts[owner].top_k * inner if owner in experts and matrix == "down" else inner


def _added_bytes(specs: Iterable[WeightSpec], itemsize: int, rank: int, size: int) -> int:
    """What products of fp8 blocks take beyond those of values: rows up to a multiple of 4, whole chunks of codes, scales.

    Codes themselves take the place of rounded inputs, which are twice as large. Counted twice, for rows of the step and those that need logits.
    """
    shapes = [spec.local_shape(rank, size) for spec in specs]
    rows = padded_tokens(1) - 1
    return sum(2 * (rows * (out + inner) * itemsize + 4 * ALIGNMENT_BYTES) for out, inner in shapes)


def _product_bytes(weights: Sequence[FormattedWeight], itemsize: int, rank: int, size: int) -> int:
    """Room for what products of packed weights and of codes need besides their operands; one at a time. Experts are not unpacked.

    fp8 codes need none of it where cuBLASLt scales their sums itself.
    """
    shapes = [
        weight.spec.local_shape(rank, size)
        for weight in weights
        if isinstance(weight.format, PackedCodes) and weight.format.is_unpacked
    ]
    unpacked = max((unpacked_bytes(shape, itemsize) + ALIGNMENT_BYTES for shape in shapes), default=0)
    has_sums = any(isinstance(weight.format, RowCodes) for weight in weights)
    return unpacked + (SUM_BYTES + ALIGNMENT_BYTES if has_sums else 0)


def _fp8_scales(specs: Iterable[AttentionSpec], place: Topology) -> int:
    tp = place.tp_rank, place.layout.tp
    return fp8_scale_bytes(local_kv_heads(spec.num_kv_heads, *tp).size for spec in specs if spec.cached)


def _weight_part(name: str) -> str:
    """Which of `WEIGHT_PARTS` a weight belongs to, by the names that all families use."""
    owner = name.rpartition(".")[2]
    if "norm" in owner:
        return "norms"
    parts = {
        "embed": "embedding",
        "positions": "embedding",
        "lm_head": "head",
        "qkv": "attention",
        "output": "attention",
    }
    return parts.get(owner, "mlp")
