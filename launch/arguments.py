# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share, and what a module of a command needs besides."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from phalanx.launch.parser import CommandParser, path_or_stream
from phalanx.launch.running import job_arguments, own_arguments, run_command

if TYPE_CHECKING:
    from phalanx.runtime.config import EngineConfig

__all__ = [
    "CommandParser",
    "add_engine_arguments",
    "add_model_argument",
    "add_model_arguments",
    "add_model_file_argument",
    "add_parallel_arguments",
    "engine_config",
    "engine_options",
    "job_arguments",
    "own_arguments",
    "path_or_stream",
    "run_command",
]


def add_parallel_arguments(
    parser: argparse.ArgumentParser, tp: str = "all other ranks", pp: str = "1"
) -> argparse._ArgumentGroup:
    """``--tp``, ``--pp``, ``--dp``; with none given, tp = number of ranks. Returns the group, for more flags about the layout.

    Args:
        tp, pp: what their default is, in words.
    """
    group = parser.add_argument_group("layout (ranks = dp x pp x tp)")
    for short, what, default in (("tp", "tensor", tp), ("pp", "pipeline", pp), ("dp", "data", "1")):
        group.add_argument(f"--{what}-parallel-size", f"--{short}", dest=short, type=int, metavar="N",
                           help=f"{what}-parallel size (default: {default})")  # fmt: skip
    return group


class _Model(argparse.Action):
    """Takes the model from the flag or from the word, once."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if values is None or values == argparse.SUPPRESS:
            return
        if not values:
            raise argparse.ArgumentError(self, "the name is empty; give one, or leave it out for the demo checkpoint")
        given = getattr(namespace, "model", None)
        if given is not None and given != Path(values):
            if isinstance(parser, CommandParser) and parser.is_from_settings(self):
                return  # the command line wins
            if isinstance(parser, CommandParser):
                parser.refuse_unknown_flags()  # whose value would be taken for the model
            parser.error(f"two models, {given} and {values}; give one")
        namespace.model = Path(values)


def add_model_argument(parser: argparse._ActionsContainer, text: str) -> None:
    """``--model DIR``, or ``DIR`` as a positional argument."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, action=_Model, help="the same as --model MODEL"
    )
    parser.add_argument("--model", action=_Model, metavar="DIR", help=text)


def add_model_file_argument(parser: argparse._ActionsContainer) -> None:
    """``--model-file FILE``."""
    parser.add_argument("--model-file", type=Path, metavar="FILE",
                        help="Python file that defines the model's family (docs/howto/own-model.md)")  # fmt: skip


def add_model_arguments(parser: CommandParser) -> None:
    """Which model, in which type, on which engine."""
    from phalanx.runtime.config import DTypeName, KvCacheDType, QuantizeName
    from phalanx.runtime.executors.registry import ENGINES

    group = parser.add_argument_group("model")
    add_model_argument(
        group,
        "Hugging Face directory, ORG/NAME in its cache, or output of phalanx split (default: the demo checkpoint)",
    )
    add_model_file_argument(group)
    group.add_argument("--load-format", choices=("auto", "dummy"), default="auto",
                       help="dummy: seeded random weights; needs config.json only")  # fmt: skip
    group.add_argument("--dtype", choices=get_args(DTypeName), default="auto",
                       help="compute type; auto: that of the checkpoint")  # fmt: skip
    group.add_argument("--expert-parallel", action="store_true",
                       help="tensor-parallel ranks own experts whole, instead of a share of each")  # fmt: skip
    group.add_argument("--quantize", choices=get_args(QuantizeName), default="none",
                       help="fp8, int8: quantise the weights of a float checkpoint while loading, and activations at run time")  # fmt: skip
    group.add_argument("--kv-cache-dtype", choices=get_args(KvCacheDType), default="auto",
                       help="auto: what the checkpoint asks for, else the compute type")  # fmt: skip
    group.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="auto: cuda if a GPU and CuPy are available, else numpy",
    )
    group.add_argument("--engine-dir", type=Path, metavar="DIR",
                       help="TensorRT engines made by phalanx build (default: build them at first use)")  # fmt: skip
    parser.no_effect("without --engine tensorrt; add that", lambda args: args.engine != "tensorrt", "--engine-dir")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS",
                       help="maximum length of prompt + output (default: the model's; bench: that of its requests)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="seed of random weights and of requests that give none")  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How much runs at once."""
    from phalanx.runtime.config import EngineConfig
    from phalanx.runtime.executors.registry import DEFAULT_MAX_NUM_SEQS, ENGINES

    defaults = EngineConfig()
    larger = [
        f"{name} {entry.max_num_seqs}" for name, entry in ENGINES.items() if entry.max_num_seqs != DEFAULT_MAX_NUM_SEQS
    ]
    group = parser.add_argument_group("engine")
    group.add_argument("--max-num-seqs", type=int, default=None, metavar="N",
                       help=f"maximum number of sequences that run at once (default: {'; '.join([str(DEFAULT_MAX_NUM_SEQS), *larger])})")  # fmt: skip
    group.add_argument("--max-num-batched-tokens", type=int, default=None, metavar="N",
                       help=f"maximum number of tokens in a step (default: {defaults.max_num_batched_tokens})")  # fmt: skip
    group.add_argument("--block-size", type=int, default=None, metavar="TOKENS",
                       help=f"tokens in a cache block (default: {defaults.block_size})")  # fmt: skip
    group.add_argument(
        "--num-kv-blocks", type=int, default=None, metavar="N", help="blocks in the cache (default: as many as fit)"
    )
    group.add_argument("--gpu-memory-utilization", type=float, default=defaults.gpu_memory_utilization, metavar="FRACTION",
                       help="fraction of the GPU memory to use")  # fmt: skip
    group.add_argument("--max-queued-requests", type=int, default=None, metavar="N",
                       help=f"maximum number of waiting requests (default: {defaults.max_queued_requests}; bench: --num-prompts)")  # fmt: skip
    group.add_argument("--no-prefix-caching", action="store_true", help="do not share cache blocks between requests")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as keyword arguments of `phalanx.runtime.llm.LLM` (less the model)."""
    names = ("engine", "dtype", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
             "num_kv_blocks", "quantize", "kv_cache_dtype", "model_file", "engine_dir", "gpu_memory_utilization", "max_queued_requests",
             "scheduling_policy", "seed")  # fmt: skip
    options = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    options["expert_parallel"] = getattr(args, "expert_parallel", False)
    options["prefix_caching"] = not getattr(args, "no_prefix_caching", False)
    return {
        "tensor_parallel_size": args.tp,
        "pipeline_parallel_size": args.pp,
        "data_parallel_size": args.dp,
        **options,
    }


def engine_config(args: argparse.Namespace, world_size: int) -> EngineConfig:
    """The operator's choices as one frozen value.

    Raises:
        ConfigError: sizes that do not fit each other or ``world_size``.
    """
    from phalanx.parallel.topology import resolve_layout
    from phalanx.runtime.config import EngineConfig
    from phalanx.runtime.executors.registry import with_default_sizes

    options = engine_options(args)
    sizes = [options.pop(f"{axis}_parallel_size") for axis in ("tensor", "pipeline", "data")]
    return EngineConfig(layout=resolve_layout(world_size, *sizes), **with_default_sizes(options))
