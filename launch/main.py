# SPDX-License-Identifier: Apache-2.0
"""The console script ``phalanx <command>``: the same as ``python -m launch.<command>``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from phalanx.launch.commands import COMMANDS
from phalanx.launch.running import run_command
from phalanx.launch.version import version_text
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    run_command(_dispatch)


def _dispatch(argv: Sequence[str] | None) -> int | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        if launch_info().rank == 0:
            print(version_text())
        return 0
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
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        suggestion = f"did you mean {close[0]}? There are" if close else "use one of"
        raise ConfigError(f"{command!r} is not a command; {suggestion}: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"phalanx.launch.{command}")
    status: int | None = module.main(rest)
    return status


if __name__ == "__main__":
    main()
