"""Writes docs/reference from the code: every flag of every command, every environment variable, the Python interface.

Run as ``python tools/write_reference.py`` after a change of flags; a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "docs" / "reference"
NOTE = "<!-- Written by tools/write_reference.py from the code; edit there. -->\n"


def commands_page() -> str:
    """Flags of every command."""
    from phalanx.launch.commands import COMMANDS
    from phalanx.launch.completion import command_parsers
    from phalanx.launch.settings import variable_name

    lines = [
        NOTE, "# Commands\n",
        "`phalanx <command>` and `python -m launch.<command>` are the same. Every flag can also be set by the environment variable",
        "in its row or, under the same name, in the file of `--config` (YAML, TOML, JSON); the command line wins over the",
        "environment, the environment over the file. Words may be written with `_` for `-`; abbreviations are not taken.\n",
    ]  # fmt: skip
    for name, parser in command_parsers().items():
        lines += [f"## {name}\n", f"{parser.description or COMMANDS[name.split()[0]]}\n"]
        lines += ["| flag | default | meaning | variable |", "|---|---|---|---|"]
        lines += [_row(action, variable_name) for action in parser._actions if "--help" not in action.option_strings]
        lines.append("")
    return "\n".join(lines)


def _row(action: argparse.Action, variable_name: object) -> str:
    assert callable(variable_name)
    flags = action.option_strings
    value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(map(str, action.choices or ('VALUE',)))}"
    shown = ", ".join(f"`{flag}{value}`" for flag in flags) or f"`{action.metavar or action.dest}`"
    has_none = action.default in (None, argparse.SUPPRESS, []) or action.default is False
    default = "" if has_none else f"`{action.default}`"
    long = next((flag for flag in flags if flag.startswith("--") and flag != "--version"), None)
    variable = "" if long is None else f"`{variable_name(long)}`"
    return "| " + " | ".join(text.replace("|", "\\|") for text in (shown, default, action.help or "", variable)) + " |"


def python_page() -> str:
    """`LLM`, `SamplingParams` and what a call returns."""
    import phalanx
    from phalanx.runtime.request import RequestOutput

    lines = [
        NOTE,
        "# Python\n",
        "`from phalanx import LLM, SamplingParams`, in a script that `mpirun` starts on every rank.\n",
    ]
    lines += [
        f"## LLM\n\n```python\n{_signature(phalanx.LLM)}\n```\n",
        f"```text\n{inspect.getdoc(phalanx.LLM)}\n```\n",
    ]
    for name, member in inspect.getmembers(phalanx.LLM):
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            signature = f"{name}{inspect.signature(member)}" if inspect.isfunction(member) else name
            lines.append(f"### {name}\n\n```python\n{signature}\n```\n\n```text\n{inspect.getdoc(member)}\n```\n")
    for value in (phalanx.SamplingParams, RequestOutput):
        lines += [
            f"## {value.__name__}\n",
            f"```text\n{inspect.getdoc(value)}\n```\n",
            "| field | default |",
            "|---|---|",
        ]
        lines += [f"| `{field.name}` | {_default(field)} |" for field in dataclasses.fields(value)]
        lines.append("")
    return "\n".join(lines)


def _signature(value: type) -> str:
    return f"{value.__name__}{inspect.signature(value)}"


def _default(field: dataclasses.Field[object]) -> str:
    return "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def engines_page() -> str:
    """Which engine runs which family, by what the executors declare and what the families' test configurations use."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA
    from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
    from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES as TENSORRT
    from phalanx.runtime.models import find_model
    from phalanx.runtime.models.shapes import use_of
    from tests.support.checkpoints import CASES

    uses: dict[str, list[set[str]]] = {}
    for case in CASES:
        model = find_model(case.config)
        names = {feature.name for feature in use_of(model, model.read_config(case.config)).features}
        uses.setdefault(model.architecture, []).append(names)
    lines = [
        NOTE, "# Families and engines\n",
        "What each executor declares, compared with what the configurations of `tests/support` use of each family. *refused*: every",
        "configuration is refused, by these names, before weights are read; *without*: configurations that use these are refused. Sizes",
        "have limits, too (the CUDA engine takes heads of up to 256 in multiples of 8). `phalanx check MODEL` says it for one model.",
        "Which of them have run on GPUs is in [README.md](../../README.md).\n",
        "| family | NumPy | CUDA | TensorRT |", "|---|---|---|---|",
    ]  # fmt: skip
    for architecture, used in sorted(uses.items()):
        verdicts = [
            _verdict([sorted(each - engine.features.keys()) for each in used]) for engine in (NUMPY, CUDA, TENSORRT)
        ]
        lines.append(f"| `{architecture}` | {' | '.join(verdicts)} |")
    return "\n".join(lines) + "\n"


def _verdict(lacking: list[list[str]]) -> str:
    """``lacking``: what an engine lacks for each configuration; an option is implied by its operation."""
    names = sorted({name for each in lacking for name in each})
    shown = ", ".join(f"`{name}`" for name in names if not any(name.startswith(f"{other}.") for other in names))
    if not names:
        return "yes"
    return f"without {shown}" if [] in lacking else f"refused: {shown}"


def pages() -> dict[Path, str]:
    """Every page, by its file."""
    return {
        DIRECTORY / "commands.md": commands_page(),
        DIRECTORY / "python.md": python_page(),
        DIRECTORY / "engines.md": engines_page(),
    }


def main() -> None:
    """Write them."""
    DIRECTORY.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
