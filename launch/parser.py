# SPDX-License-Identifier: Apache-2.0
"""The command line of every command: ``argparse`` with settings from elsewhere, suggestions, and one message for all ranks."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from phalanx.launch.settings import PREFIX, Settings, variable_name
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.logs import LOG_FORMATS, LOG_LEVELS, LogFormat, LogLevel, configure

__all__ = ["CommandParser", "UsageError", "log_format", "log_level", "path_or_stream"]

_YES_NO = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
    "": False,
}
_SIMILAR = 0.75
"""Two letters that changed places in a word of four are that far from it."""
_ONLY_ON_THE_COMMAND_LINE = ("--help", "--version", "--config")


def log_level(args: argparse.Namespace) -> LogLevel:
    """``--log-level``."""
    level: LogLevel = getattr(args, "log_level", "info")
    return level


def log_format(args: argparse.Namespace) -> LogFormat:
    """``--log-format``."""
    chosen: LogFormat = getattr(args, "log_format", "text")
    return chosen


class UsageError(ConfigError):
    """The command line, a variable or the configuration file is wrong; the message begins with the command's name."""


class _Help(argparse.HelpFormatter):
    """Shows each flag's default, once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shows_nothing = action.default in (None, argparse.SUPPRESS, []) or action.default is False
        if shows_nothing or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".lstrip()


class _Version(argparse.Action):
    """Prints the versions that matter, once, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from phalanx.launch.version import version_text

        if launch_info().rank == 0:
            print(version_text())
        raise SystemExit(0)


class CommandParser(argparse.ArgumentParser):
    """Flags as documented: whole names only, ``_`` as good as ``-``, a wrong one reported in one line with the nearest right one."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=_as_started(prog), allow_abbrev=False, formatter_class=_Help, **options)
        self._settings = Settings(())
        self._words: list[str] = []
        self._origins: dict[str, str] = {}
        self._without_effect: dict[str, tuple[str, Callable[[argparse.Namespace], object]]] = {}
        self.register("type", Path, _path)
        self.register("type", float, _finite)
        self.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
        self.add_argument("--config", metavar="FILE", help="YAML, TOML or JSON file with flags as keys")
        # Without a default here: that of a mode, as in `bench throughput`, would replace what its command was given.
        self.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS,
                          help="lowest level that standard error shows; warning and above: no progress, start block or request log "
                          "(default: info)")  # fmt: skip
        self.add_argument("--log-format", choices=LOG_FORMATS, default=argparse.SUPPRESS,
                          help="text: lines for people; json: one object per line (default: text)")  # fmt: skip

    @property
    def command(self) -> str:
        """``launch.bench throughput -> bench``."""
        return self.prog.removeprefix("launch.").removeprefix("phalanx ").partition(" ")[0]

    def command_line(self, argv: Sequence[str] | None) -> str:
        """Return what a shell takes to run this command with ``argv`` again; None = the words that this process was started with."""
        start = self.prog if self.prog.startswith("phalanx ") else f"python -m {self.prog}"
        return f"{start} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()

    def parse_settings(self, settings: Settings) -> argparse.Namespace:
        """Parse the words together with what environment and file add.

        Raises:
            UsageError: a flag or a value is wrong, wherever it came from.
        """
        self._settings = settings
        for parser in self.modes().values():
            parser._settings = settings
        args: argparse.Namespace = self.parse_args(settings.words)
        configure(log_level(args), log_format(args))
        return args

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self._refuse_unknown(rest)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [self._spelled(word) for word in (sys.argv[1:] if args is None else args)]
        added = [] if self.modes() else list(self._words_from_settings(words))
        end = words.index("--") if "--" in words else len(words)
        given = self._words = [*words[:end], *added]
        found, rest = super().parse_known_args([*given, *words[end:]], namespace)
        self._refuse_without_effect(given, found)
        return found, rest

    def refuse_unknown_flags(self) -> None:
        """Raise UsageError if a word is a flag that this command does not have."""
        unknown = [word for word in self._words if word.startswith("--") and word.partition("=")[0] not in self.flags()]
        if unknown:
            self._refuse_unknown(unknown)

    def _refuse_unknown(self, rest: Sequence[str]) -> NoReturn:
        self.error(f"unrecognized arguments: {' '.join(rest)}{self._suggestion(rest)}")

    def no_effect(self, where: str, applies: Callable[[argparse.Namespace], object], *flags: str) -> None:
        """Have ``flags`` refused where they would change nothing.

        Args:
            where: when that is, and what to do: ``without --supervise; add that``.
            applies: whether it is so with these arguments.
        """
        known = self.flags()
        for flag in flags:
            for name in known[flag].option_strings:
                self._without_effect[name] = where, applies

    def _refuse_without_effect(self, words: Sequence[str], args: argparse.Namespace) -> None:
        for word in words:
            flag = word.partition("=")[0] if word.startswith("--") else word[:2]  # -n8 is -n 8
            if flag in self._without_effect and self._without_effect[flag][1](args):
                where, name = self._without_effect[flag][0], "/".join(self._option_string_actions[flag].option_strings)
                self.error(f"argument {name}: has no effect {where}, or leave {flag} out")

    def error(self, message: str) -> NoReturn:
        """Raise what `run_command` prints once for all ranks."""
        origin = next((origin for flag, origin in self._origins.items() if message.startswith(f"argument {flag}:")), "")
        raise UsageError(f"{self.prog}: {message}{f' (from {origin})' if origin else ''} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print the help once, not once a rank."""
        if launch_info().rank == 0:
            super().print_help(file)

    def is_given(self, action: argparse.Action) -> bool:
        """Whether a flag was given, on the command line or elsewhere, perhaps with its default."""
        return any(word.partition("=")[0] in action.option_strings for word in self._words)

    def is_from_settings(self, action: argparse.Action) -> bool:
        """Whether a flag's value comes from the environment or the file."""
        return "/".join(action.option_strings) in self._origins

    def flags(self) -> dict[str, argparse.Action]:
        """Every long flag, with its action."""
        return {flag: action for action in self._actions for flag in action.option_strings if flag.startswith("--")}

    def modes(self) -> dict[str, CommandParser]:
        """Parsers of the words that come first, as in ``bench throughput``; empty for a command without modes."""
        choices = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(choices[0]) if choices else {}

    def _spelled(self, word: str) -> str:
        """``--max_num_seqs=4 -> --max-num-seqs=4``."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return f"{dashed}{equals}{value}" if word.startswith("--") and dashed in self.flags() else word

    def _suggestion(self, rest: Sequence[str]) -> str:
        known = [flag for parser in (self, *self.modes().values()) for flag in parser.flags()]
        word = next((word for word in rest if word.startswith("-")), "").partition("=")[0].replace("_", "-")
        if word in known:
            return (
                f"; it belongs to {' and '.join(name for name, mode in self.modes().items() if word in mode.flags())}"
            )
        close = [flag for flag in known if len(word) > 3 and flag.startswith(word)]
        close += difflib.get_close_matches(word, known, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def _words_from_settings(self, words: Sequence[str]) -> Iterator[str]:
        flags = self.flags()
        done = [flags[name] for word in words if (name := word.partition("=")[0]) in flags]
        for source in (self._variables(), self._config()):
            for flag, value, origin in source:
                action = flags[flag]
                if action not in done:
                    done.append(action)
                    self._origins["/".join(action.option_strings)] = origin
                    yield from self._as_words(flag, action, value, origin)

    def _variables(self) -> Iterator[tuple[str, Any, str]]:
        known = {variable_name(flag): flag for flag in self.flags() if flag not in _ONLY_ON_THE_COMMAND_LINE}
        for name, value in self._settings.variables.items():
            if name in known:
                yield known[name], value, name
            elif (close := _similar_variable(name, known)) and not _is_setting(name):
                self.error(f"environment variable {name} is not a setting; did you mean {close}?")

    def _config(self) -> Iterator[tuple[str, Any, str]]:
        known = [flag for flag in self.flags() if flag not in _ONLY_ON_THE_COMMAND_LINE]
        for key, value in self._settings.config.items():
            if f"--{key}" not in known:
                self.error(f"{self._settings.config_file}: {key!r} is not a flag{self._suggestion([f'--{key}'])}")
            if value is not None:
                yield f"--{key}", value, f"{self._settings.config_file}: {key}"

    def _as_words(self, flag: str, action: argparse.Action, value: Any, origin: str) -> list[str]:
        if action.nargs == 0:
            return [flag] if self._is_yes(value, origin) else []
        values = value if isinstance(value, list) else [value]
        if bad := [item for item in values if isinstance(item, (dict, list, bool))]:
            self.error(f"{origin}={bad[0]!r} is not a value of {flag}")
        if action.nargs in ("+", "*"):
            return [flag, *(shlex.split(value) if isinstance(value, str) else map(str, values))]
        if len(values) > 1 and not isinstance(action, argparse._AppendAction):
            self.error(f"{origin} has {len(values)} values; {flag} takes one")
        return [f"{flag}={item}" for item in values]

    def _is_yes(self, value: Any, origin: str) -> bool:
        answer = value if isinstance(value, bool) else _YES_NO.get(str(value).lower())
        if answer is None:
            self.error(f"{origin}={value!r} is neither yes nor no; use true or false")
        return bool(answer)


def _similar_variable(name: str, known: Iterable[str]) -> str:
    """The one of ``known`` that ``name`` is probably a slip of; empty if there is none: other programs may use our prefix."""
    rests = [other.removeprefix(PREFIX) for other in known]
    close = difflib.get_close_matches(name.removeprefix(PREFIX), rests, n=1, cutoff=_SIMILAR)
    return f"{PREFIX}{close[0]}" if close else ""


def _is_setting(name: str) -> bool:
    """Whether another command takes the variable."""
    from phalanx.launch.completion import command_parsers

    return any(variable_name(flag) == name for parser in command_parsers().values() for flag in parser.flags())


def path_or_stream(text: str) -> Path:
    """For ``type`` of a flag that takes ``-`` as standard input or output, which others refuse."""
    if not text:  # would be the working directory: as a rule a variable of a script that is not set
        raise argparse.ArgumentTypeError("the path is empty; give one, or leave the flag out")
    return Path(text)


def _path(text: str) -> Path:
    path = path_or_stream(text)
    if text == "-":
        raise argparse.ArgumentTypeError("- does not stand for standard input or output here; give a path")
    return path


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number; leave the flag out where there is no limit")
    return number


def _as_started(prog: str) -> str:
    """``launch.serve`` is ``phalanx serve`` for a user who started it so."""
    return prog.replace("launch.", "phalanx ", 1) if os.path.basename(sys.argv[0]) == "phalanx" else prog
