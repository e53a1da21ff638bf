"""The console script ``phalanx <command>``: the same as ``python -m launch.<command>``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from phalanx.launch.arguments import run_command
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "serve": "answer HTTP requests (OpenAI protocol)",
    "generate": "continue prompts and print the result",
    "eval": "loss and perplexity of a checkpoint on a text file",
    "bench": "throughput and latency",
    "split": "write one weight shard per rank",
    "build": "build TensorRT engines, one per rank",
    "plan": "memory per rank and how many sequences fit",
    "tune": "show or refresh the GEMM tuning cache of this GPU",
    "doctor": "what works on this machine, with the fix beside each failure",
}


def main() -> None:
    """Entry point of the console script."""
    run_command(_dispatch)


def _dispatch(argv: Sequence[str] | None) -> int | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
        if launch_info().rank == 0:
            print(
                "usage: phalanx <command> [options]\n\n" + "\n".join(lines) + "\n\nphalanx <command> --help tells more"
            )
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise ConfigError(f"{command!r} is not a command; use one of: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"phalanx.launch.{command}")
    status: int | None = module.main(rest)
    return status


if __name__ == "__main__":
    main()
