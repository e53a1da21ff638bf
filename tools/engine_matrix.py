"""Write the table in docs/models.md of which engine runs which family: ``python -m tools.engine_matrix`` (or ``make key-tables``).

It is made from what the executors declare and what the small configurations of the tests use; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phalanx.runtime.executors.capabilities import Capabilities
from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA
from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES as TENSORRT
from phalanx.runtime.models import MODELS, find_model
from phalanx.runtime.models.shapes import use_of
from tests.support.checkpoints import CASES

PATH = Path(__file__).resolve().parent.parent / "docs" / "models.md"
START, END = "<!-- engines: written by `make key-tables` -->\n", "<!-- end -->\n"
ENGINES = (NUMPY, CUDA, TENSORRT)


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


def document() -> str:
    """The text of docs/models.md with the table as the code says it."""
    text = PATH.read_text()
    before, rest = text.split(START)
    return before + START + "".join(f"{line}\n" for line in _lines()) + END + rest.split(END)[1]


def _lines() -> Iterator[str]:
    yield "| `architectures` | " + " | ".join(f"`{engine.engine}`" for engine in ENGINES) + " |"
    yield "|---|" + "---|" * len(ENGINES)
    for architecture in sorted(MODELS):
        yield f"| `{architecture}` | " + " | ".join(cell(engine, architecture) for engine in ENGINES) + " |"


if __name__ == "__main__":
    PATH.write_text(document())
