# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.plan``: memory per rank and how many sequences fit, from ``config.json`` alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from phalanx.launch.arguments import (
    CommandParser,
    add_model_argument,
    add_model_file_argument,
    own_arguments,
    run_command,
)
from phalanx.launch.layouts import GPUS, Load, best_layouts
from phalanx.launch.plan_report import comparison, table
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.runtime.config import EngineConfig, ModelConfig
    from phalanx.runtime.memory import RankMemory

__all__ = ["build_parser", "main", "plan"]

_GIB = 1 << 30


def build_parser() -> CommandParser:
    """Return the command's parser: model, layout, and the engine's flags that change the memory."""
    from phalanx.runtime.config import GPU_MAX_NUM_SEQS, DTypeName, KvCacheDType, QuantizeName

    parser = CommandParser(
        prog="launch.plan",
        description="Memory per rank and how many sequences fit. Needs config.json only: no GPU, no MPI, no weights.",
    )
    add_model_argument(parser, "directory with config.json (default: the demo)")
    for short, long in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data")):
        parser.add_argument(
            f"--{long}-parallel-size",
            f"--{short}",
            dest=short,
            type=int,
            default=1,
            metavar="N",
            help=f"{long}-parallel size",
        )
    parser.add_argument(
        "--dtype",
        choices=get_args(DTypeName),
        default="auto",
        help="compute type; auto: the checkpoint's own",
    )
    add_model_file_argument(parser)
    parser.add_argument("--expert-parallel", action="store_true", help="as phalanx serve")
    parser.add_argument("--quantize", choices=get_args(QuantizeName), default="none", help="as phalanx serve")
    parser.add_argument("--kv-cache-dtype", choices=get_args(KvCacheDType), default="auto", help="as phalanx serve")
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        metavar="G",
        help="memory of one GPU (default: that of --gpu with --optimise; else show sizes only)",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.90,
        metavar="FRACTION",
        help="fraction of the GPU memory to use",
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="maximum length of prompt + output (default: the model's)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=GPU_MAX_NUM_SEQS, metavar="N",
                        help=f"maximum number of sequences that run at once (default: {GPU_MAX_NUM_SEQS})")  # fmt: skip
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="maximum number of tokens in a step"
    )
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS", help="tokens in one cache block")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--optimise", choices=("throughput", "latency"),
                        help="compare all layouts of --ranks: highest throughput, or shortest time per token of a single request")  # fmt: skip
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs that --optimise may use")
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="which ones, for --optimise (also their memory)"
    )
    parser.add_argument(
        "--input-len", type=int, default=1024, metavar="TOKENS", help="tokens of a prompt, for --optimise"
    )
    parser.add_argument(
        "--output-len", type=int, default=256, metavar="TOKENS", help="tokens of an answer, for --optimise"
    )
    parser.no_effect("without --optimise; add that", lambda args: args.optimise is None,
                     "--ranks", "--gpu", "--input-len", "--output-len")  # fmt: skip
    parser.no_effect("with --optimise, which compares all layouts; leave that out", lambda args: args.optimise is not None,
                     "--tp", "--pp", "--dp")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = own_arguments(build_parser(), argv)
    if args.optimise is not None:
        return _optimise(args)
    result = plan(args)
    del result["step_record"], result["work"]
    print(json.dumps(result) if args.json else table(result))
    return 0


def _optimise(args: argparse.Namespace) -> int:
    if args.ranks is None:
        raise ConfigError("--optimise needs --ranks N, the number of GPUs; add it")
    if min(args.input_len, args.output_len) < 1:
        raise ConfigError(f"--input-len={args.input_len} and --output-len={args.output_len} must be at least 1")
    if args.gpu_memory_gib is None:
        args.gpu_memory_gib = GPUS[args.gpu].gib
    found = best_layouts(args, plan, GPUS[args.gpu], Load(args.input_len, args.output_len))
    if args.json:
        print(
            json.dumps(
                {"optimise": args.optimise, "ranks": args.ranks, "gpu": args.gpu, "layouts": list(map(asdict, found))}
            )
        )
    else:
        print(comparison(args.optimise, found))
    return 0


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--json`` prints, sizes in bytes, and what `best_layouts` needs (``step_record``, ``work``).

    Raises:
        ConfigError: the model cannot be split so, or a size is out of range.
        CheckpointError: ``config.json`` is missing or damaged.
    """
    from phalanx.checkpoints.config_files import demo_path, read_config
    from phalanx.checkpoints.files import ModelDirectory
    from phalanx.checkpoints.formats import read_formats
    from phalanx.checkpoints.quantization.held import held_formats
    from phalanx.kernels.compiler import cache_directory
    from phalanx.runtime.memory import DTYPE_BYTES, plan_memory
    from phalanx.runtime.models.expert_parallel import with_expert_parallel
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.shapes import use_of
    from phalanx.runtime.models.user_file import model_from_file
    from phalanx.runtime.quantisation import check_cache_dtype, check_quantize, has_fp8_cache, quantisation_in_words
    from phalanx.runtime.step_records import StepRecord, record_path
    from phalanx.runtime.step_work import stage_work

    raw = read_config(ModelDirectory.at(args.model or demo_path()))
    model = find_model(raw, model_from_file(args.model_file))
    config = with_expert_parallel(model, model.read_config(raw), args.expert_parallel)
    options = _options(args, config)
    assert options.max_model_len is not None
    dtype = config.compute_dtype(options.dtype)
    check_cache_dtype(options, dtype)
    stored = read_formats(raw)
    check_quantize(model, config, stored, options.quantize)
    use = use_of(model, config)
    held = held_formats(stored, options.quantize, use.experts, use.gates, options.layout.tp)
    ranks = plan_memory(
        model,
        config,
        options.layout,
        dtype,
        formats=held,
        kv_itemsize=1 if has_fp8_cache(stored, options) else None,
        max_num_seqs=options.max_num_seqs,
        max_num_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
    )
    return {
        "step_record": StepRecord.read(record_path(cache_directory(), raw, dtype, options)),
        "work": stage_work(model, config, options.layout, held, dtype),
        "hidden_size": config.hidden_size,
        "itemsize": DTYPE_BYTES[dtype],
        "model": config.architecture,
        "dtype": dtype,
        "quantize": options.quantize,
        "kv_cache_dtype": options.kv_cache_dtype,
        "quantisation": quantisation_in_words(model, config, stored, options),
        "tp": options.layout.tp,
        "pp": options.layout.pp,
        "dp": options.layout.dp,
        "num_gpus": options.layout.world_size,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "block_size": options.block_size,
        "ranks": [_rank(rank) for rank in ranks],
        **_fit(ranks, options, options.max_model_len, args.gpu_memory_gib),
    }


def _options(args: argparse.Namespace, config: ModelConfig) -> EngineConfig:
    """The flags as the engine would take them, with the model's own longest sequence filled in."""
    from phalanx.parallel.topology import Layout
    from phalanx.runtime.config import EngineConfig
    from phalanx.runtime.executors.sizes import longest_requested

    return EngineConfig(
        layout=Layout(args.tp, args.pp, args.dp),
        dtype=args.dtype,
        quantize=args.quantize,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=longest_requested(config, args.max_model_len),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )


def _rank(memory: RankMemory) -> dict[str, Any]:
    return {
        "rank": memory.rank,
        "stage": memory.stage,
        "tp_rank": memory.tp_rank,
        "layers": [memory.layers.start, memory.layers.stop],
        "weights": dict(memory.weights),
        "weight_bytes": memory.weight_bytes,
        "workspace_bytes": memory.workspace,
        "communication_bytes": memory.communication,
        "kv_block_bytes": memory.kv_block_bytes,
    }


def _fit(ranks: Sequence[RankMemory], options: EngineConfig, max_model_len: int, gib: float | None) -> dict[str, Any]:
    """How many blocks and sequences fit next to the weights; null without a memory size."""
    from phalanx.runtime.memory import RESERVE_BYTES, num_kv_blocks

    blocks_per_seq = -(-max_model_len // options.block_size)
    needed = max(rank.fixed_bytes + blocks_per_seq * rank.kv_block_bytes for rank in ranks) + RESERVE_BYTES
    result: dict[str, Any] = {
        "reserve_bytes": RESERVE_BYTES,
        "blocks_per_sequence": blocks_per_seq,
        "smallest_gpu_bytes": -int(-needed // options.gpu_memory_utilization),
        "gpu_memory_bytes": None,
        "kv_blocks": None,
        "kv_tokens": None,
        "full_length_sequences": None,
        "fits": None,
    }
    if gib is None:
        return result
    if gib <= 0:
        raise ConfigError(f"--gpu-memory-gib={gib} is not above 0; give the memory of one GPU")
    total = int(gib * _GIB)
    blocks = num_kv_blocks(ranks, int(total * options.gpu_memory_utilization) - RESERVE_BYTES)
    # Every replica serves as many again.
    fitting = blocks // blocks_per_seq * options.layout.dp
    return result | {
        "gpu_memory_bytes": total,
        "kv_blocks": blocks,
        "kv_tokens": blocks * options.block_size,
        "full_length_sequences": fitting,
        "fits": fitting > 0,
    }


if __name__ == "__main__":
    run_command(main)
