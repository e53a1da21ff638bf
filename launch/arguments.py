"""What every command shares: flags, and the contract for errors.

Exit status: 0 done; 2 the user's mistake (one line on standard error, from one rank only); 1 anything else, with rank, phase
and cause. Heavy imports happen inside functions: ``--help`` answers without NumPy, MPI or a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from phalanx.parallel.errors import CheckpointError, ConfigError, RequestError
from phalanx.parallel.launcher import launch_info

if TYPE_CHECKING:
    from phalanx.runtime.config import EngineConfig

__all__ = [
    "CommandParser",
    "add_engine_arguments",
    "add_model_arguments",
    "add_parallel_arguments",
    "engine_config",
    "engine_options",
    "run_command",
]

SPOKESMAN_SECONDS = 1.0
"""How long other ranks that found the same mistake stay, because some launchers end a job with the first rank that exits:
rank 0 must have spoken by then."""


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong flag once, not once a rank, in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if launch_info().rank == 0:
            sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def print_help(self, file: object = None) -> None:
        """Print the help once, not once a rank."""
        if launch_info().rank == 0:
            super().print_help(file)  # type: ignore[arg-type]


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """``--tp``, ``--pp``, ``--dp``; with none given, tp = number of ranks."""
    group = parser.add_argument_group("layout (ranks = dp x pp x tp)")
    for short, long, what in (("tp", "tensor", "tensor"), ("pp", "pipeline", "pipeline"), ("dp", "data", "data")):
        group.add_argument(f"--{long}-parallel-size", f"--{short}", dest=short, type=int, metavar="N",
                           help=f"{what}-parallel size")  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, in which type, on which engine."""
    from phalanx.runtime.executors.registry import ENGINES

    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, metavar="DIR",
                       help="Hugging Face directory or output of launch.split (default: the demo checkpoint)")  # fmt: skip
    group.add_argument("--load-format", choices=("auto", "dummy"), default="auto",
                       help="dummy: seeded random weights, config.json suffices")  # fmt: skip
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    group.add_argument("--engine-dir", type=Path, metavar="DIR",
                       help="TensorRT engines made by launch.build (default: build when first used)")  # fmt: skip
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt + output")
    group.add_argument("--seed", type=int, default=0)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How much runs at once."""
    from phalanx.runtime.executors.registry import DEFAULT_MAX_NUM_SEQS, ENGINES

    larger = [
        f"{name} {entry.max_num_seqs}" for name, entry in ENGINES.items() if entry.max_num_seqs != DEFAULT_MAX_NUM_SEQS
    ]
    group = parser.add_argument_group("engine")
    group.add_argument("--max-num-seqs", type=int, default=None, metavar="N",
                       help=f"most sequences that run at once (default: {'; '.join([str(DEFAULT_MAX_NUM_SEQS), *larger])})")  # fmt: skip
    group.add_argument("--max-num-batched-tokens", type=int, default=None, metavar="N", help="most tokens in one step")
    group.add_argument("--block-size", type=int, default=None, metavar="TOKENS", help="tokens in one cache block")
    group.add_argument("--num-kv-blocks", type=int, default=None, metavar="N", help="cache blocks (default: what fits)")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.90, metavar="FRACTION")
    group.add_argument("--max-queued-requests", type=int, default=None, metavar="N", help="most requests that wait")
    group.add_argument("--no-prefix-caching", action="store_true", help="do not share cache blocks between requests")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as keyword arguments of `phalanx.runtime.llm.LLM` (less the model)."""
    names = ("engine", "dtype", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
             "num_kv_blocks", "engine_dir", "gpu_memory_utilization", "max_queued_requests", "seed")  # fmt: skip
    options = {name: value for name in names if (value := getattr(args, name, None)) is not None}
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


def run_command(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command's ``main`` and turn what it raises into the exit status, never leaving other ranks waiting."""
    _share_processors()
    try:
        status = command(argv) or 0
    except SystemExit as exit_:
        _leave(exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None))
    except KeyboardInterrupt:
        _leave(130, abort=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1, abort=True)
    except (ConfigError, CheckpointError, RequestError) as error:
        _leave(2, abort=_report_mistake(error))
    except BaseException as error:
        _report_failure(error)
        _leave(1, abort=True)
    _leave(status)


def _share_processors() -> None:
    """One rank per core share: without this every rank's BLAS would start a thread per core."""
    info = launch_info()
    threads = max(1, len(os.sched_getaffinity(0)) // info.local_size)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))


def _report_mistake(error: Exception) -> bool:
    """One line from one rank; returns whether the others must be ended, because they do not know yet.

    Before MPI is up every rank has read the same arguments, so rank 0 speaks for all.
    """
    from phalanx.parallel.mpi_comm import all_ranks_failed

    everybody = all_ranks_failed()
    if launch_info().rank == 0 or not everybody:
        sys.stderr.write(f"phalanx: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
    return not everybody


def _report_failure(error: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    sys.stderr.write(f"phalanx: rank {launch_info().rank} failed{notes}: {type(error).__name__}: {error}\n")
    traceback.print_exc()
    sys.stderr.flush()


def _leave(status: int, abort: bool = False) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if abort:
        from phalanx.parallel.mpi_comm import abort_world

        abort_world(status)
    elif status and launch_info().rank:
        time.sleep(SPOKESMAN_SECONDS)
    raise SystemExit(status)
