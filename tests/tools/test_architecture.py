"""``docs/architecture.md`` says what is true: its picture has every folder, each path that it names exists, no modules import each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.measure_structure import circles, imports, modules

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PICTURE = re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[0]
ROOMS = ("runtime", "runtime/server", "parallel")
NAMED = re.compile(r"`((?:runtime|parallel|kernels|checkpoints|launch|tools|docs)/[\w/.-]*)`")


@pytest.mark.parametrize("room", ROOMS)
def test_the_picture_shows_every_folder(room: str) -> None:
    folders = [path.parent.name for path in (ROOT / room).glob("*/__init__.py")]
    assert folders
    missing = [name for name in folders if not re.search(rf"\b{name}/", PICTURE)]
    assert not missing, f"docs/architecture.md's picture lacks {missing} of {room}"


def test_the_picture_shows_only_what_exists() -> None:
    for name in re.findall(r"\b([a-z_]+(?:/[a-z_]+)*)/(?=\s|$)", PICTURE):
        places = [ROOT / name, ROOT / "runtime" / name, ROOT / "runtime" / "server" / name, ROOT / "parallel" / name]
        assert any(place.is_dir() for place in places), f"{name}/ of the picture is not a folder"
    for name in re.findall(r"\b(\w+\.py)\b", PICTURE):
        assert list(ROOT.glob(f"*/{name}")), f"{name} of the picture is not a module"


def test_every_path_that_it_names_exists() -> None:
    paths = NAMED.findall(TEXT)
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_no_modules_import_each_other() -> None:
    known = modules(ROOT)
    assert circles({name: imports(name, path, known) for name, path in known.items()}) == []
