"""Write which engine runs which family into docs/models.md, and in short into README.md: ``python -m tools.engine_matrix`` (or ``make key-tables``).

Both tables are made from what the executors declare and what the small configurations of the tests use; a test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from phalanx.runtime.executors.capabilities import Capabilities
from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA
from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES as TENSORRT
from phalanx.runtime.models import MODELS, find_model
from phalanx.runtime.models.shapes import use_of
from tests.support.checkpoints import CASES

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->\n"
ENGINES = (NUMPY, CUDA, TENSORRT)
_SHORT = {
    "ChatGLMForConditionalGeneration": "ChatGLM-6B (the first)",
    "Gemma3ForConditionalGeneration": "Gemma3 (text of checkpoints with images)",
    "Mistral3ForConditionalGeneration": "Mistral3 (text of checkpoints with images)",
}
"""Of names that are another family's, too, once shortened."""


def missing(capabilities: Capabilities, architecture: str) -> list[set[str]]:
    """What an engine lacks for each configuration of a family; the parts of a feature that it lacks are not listed."""
    found = []
    for case in CASES:
        if find_model(case.config).architecture == architecture:
            model = find_model(case.config)
            features = [feature.name for feature in use_of(model, model.read_config(case.config)).features]
            lacking = [name for name in features if name not in capabilities.features]
            found.append({name for name in lacking if not any(name.startswith(f"{other}.") for other in lacking)})
    return found


def cell(capabilities: Capabilities, architecture: str) -> str:
    """``yes``, ``no`` and why, or ``yes`` with what is refused of some configurations."""
    lacking = missing(capabilities, architecture)
    names = ", ".join(f"`{name}`" for name in sorted(set().union(*lacking)))
    if not names:
        return "yes"
    return f"no: {names}" if all(lacking) else f"yes, without {names}"


def documents() -> dict[Path, str]:
    """Both files' texts with the tables as the code says them."""
    return {
        ROOT / "docs" / "models.md": _filled("docs/models.md", "engines", _lines()),
        ROOT / "README.md": _filled("README.md", "families", _short_lines()),
    }


def _filled(name: str, table: str, lines: Iterable[str]) -> str:
    start = f"<!-- {table}: written by `make key-tables` -->\n"
    before, rest = (ROOT / name).read_text().split(start)
    return before + start + "".join(f"{line}\n" for line in lines) + END + rest.split(END, 1)[1]


def _lines() -> Iterator[str]:
    yield from _head("`architectures`")
    for architecture in sorted(MODELS):
        yield f"| `{architecture}` | " + " | ".join(cell(engine, architecture) for engine in ENGINES) + " |"


def _short_lines() -> Iterator[str]:
    """A row for all families that the same engines run."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for architecture in sorted(MODELS):
        cells = tuple(cell(engine, architecture) for engine in ENGINES)
        name = re.sub("(ForCausalLM|LMHeadModel|Model|ForConditionalGeneration)$", "", architecture)
        groups.setdefault(cells, []).append(_SHORT.get(architecture, name))
    yield from _head("families")
    for cells, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"| {', '.join(names)} | " + " | ".join(cells) + " |"


def _head(first: str) -> Iterator[str]:
    yield f"| {first} | " + " | ".join(f"`{engine.engine}`" for engine in ENGINES) + " |"
    yield "|---|" + "---|" * len(ENGINES)


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
