"""What is shipped: metadata, the source distribution, container definitions, links of the documents."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from phalanx import __version__
from phalanx.launch.commands import COMMANDS

from .commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTAINERS = ROOT / "containers"
FOLDERS = ("checkpoints", "containers", "docs", "kernels", "launch", "parallel", "runtime", "slurm", "tests", "tools")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return files.stdout.split()


def shipped(name: str) -> bool:
    """By the manifest, or because the wheel holds it."""
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        kind, *words = line.split()
        if kind == "include" and any(fnmatch(name, word) and word.count("/") == name.count("/") for word in words):
            return True
        is_below = kind == "recursive-include" and name.startswith(words[0] + "/")
        if is_below and any(fnmatch(Path(name).name, pattern) for pattern in words[1:]):
            return True
    return name.startswith("checkpoints/demo/") or name in ("MANIFEST.in", "pyproject.toml", "setup.py")


def test_the_source_distribution_holds_every_file() -> None:
    links = {f"tools/tree/phalanx/{name}" for name in ("checkpoints", "kernels", "launch", "parallel", "runtime")}
    missing = [name for name in tracked() if not shipped(name) and name != ".gitignore" and name not in links]
    assert missing == []


def test_versions_agree() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {PROJECT["version"], *cited} == {__version__}


def test_what_the_package_promises_is_there() -> None:
    assert {"authors", "keywords", "classifiers", "license", "readme"} <= set(PROJECT)
    assert all(f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"] for minor in (11, 12, 13))


def test_nothing_tells_to_install_a_name_that_is_not_on_pypi() -> None:
    wrong = [
        name
        for name in tracked()
        if name.endswith((".py", ".md", ".def", "Dockerfile")) and name != "tests/launch/test_packaging.py"
        and re.search(r"install ['\"]?phalanx-llm", (ROOT / name).read_text())
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize("name", ["Dockerfile", "phalanx.def"])
def test_container_definitions_name_what_exists(name: str) -> None:
    text = (CONTAINERS / name).read_text()
    (extras,) = re.findall(r"/opt/phalanx\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    commands, files = re.findall(r"phalanx (\w+) ", text), re.findall(r"containers/[\w.]+", text)
    assert commands
    assert set(commands) <= set(COMMANDS)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_dockerfile_has_known_instructions_in_order() -> None:
    text = re.sub(r"\\\n", " ", (CONTAINERS / "Dockerfile").read_text())
    words = [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert words[0] == "FROM"
    assert set(words) <= {"FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "EXPOSE", "STOPSIGNAL", "CMD"}
    assert words.index("USER") > max(place for place, word in enumerate(words) if word == "RUN")


def test_the_apptainer_definition_has_known_sections() -> None:
    lines = (CONTAINERS / "phalanx.def").read_text().splitlines()
    assert [line for line in lines if line.startswith("Bootstrap:")] == ["Bootstrap: docker"]
    assert {line[1:] for line in lines if line.startswith("%")} <= {"files", "post", "environment", "runscript", "test"}


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
            broken.append(target)
    assert broken == []
