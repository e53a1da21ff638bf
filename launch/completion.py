# SPDX-License-Identifier: Apache-2.0
"""``phalanx completion bash|zsh|fish``: a script that completes commands, flags and their choices, made from the parsers."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence

from phalanx.launch.arguments import CommandParser, own_arguments, run_command
from phalanx.launch.commands import COMMANDS

__all__ = ["command_parsers", "main"]

_BASH = """_phalanx() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur")); return
    fi
    case "${{COMP_WORDS[1]}} $previous" in
{choices}
        *) [[ $cur == -* ]] && case "${{COMP_WORDS[1]}}" in
{flags}
        esac ;;
    esac
    if [[ $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur")); else COMPREPLY=($(compgen -f -- "$cur")); fi
}}
complete -o filenames -F _phalanx phalanx
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.completion",
        description='Print a completion script, for example: eval "$(phalanx completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell will read the script")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints the script."""
    shell = own_arguments(build_parser(), argv).shell
    print({"bash": _bash, "zsh": lambda: _ZSH + _bash(), "fish": _fish}[shell](), end="")
    return 0


def command_parsers() -> dict[str, CommandParser]:
    """The parser of every command, and of every mode of one as ``bench throughput``."""
    parsers: dict[str, CommandParser] = {}
    for command in COMMANDS:
        parser = importlib.import_module(f"phalanx.launch.{command}").build_parser()
        modes = parser.modes()
        parsers |= {f"{command} {mode}": modes[mode] for mode in modes} or {command: parser}
    return parsers


def _flags() -> Iterator[tuple[str, str, argparse.Action]]:
    for name, parser in command_parsers().items():
        for flag, action in parser.flags().items():
            yield name.partition(" ")[0], flag, action


def _bash() -> str:
    flags: dict[str, dict[str, None]] = {command: {} for command in COMMANDS}
    choices: dict[str, str] = {}
    for command, flag, action in _flags():
        flags[command][flag] = None
        if action.choices is not None:
            choices[f"{command} {flag}"] = " ".join(map(str, action.choices))
    return _BASH.format(
        commands=" ".join(COMMANDS),
        choices="\n".join(f'        "{place}") words="{words}" ;;' for place, words in choices.items()),
        flags="\n".join(f'            {command}) words="{" ".join(names)}" ;;' for command, names in flags.items()),
    )


def _fish() -> str:
    lines = ["complete -c phalanx -f"]
    for command, text in COMMANDS.items():
        lines.append(f"complete -c phalanx -n __fish_use_subcommand -a {command} -d '{text}'")
    for command, flag, action in _flags():
        words = f" -xa '{' '.join(map(str, action.choices))}'" if action.choices is not None else ""
        value = "" if action.nargs == 0 or words else " -rF"
        lines.append(f"complete -c phalanx -n '__fish_seen_subcommand_from {command}' -l {flag[2:]}{words}{value}")
    return "\n".join(dict.fromkeys(lines)) + "\n"


if __name__ == "__main__":
    run_command(main)
