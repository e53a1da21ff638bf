"""Every TensorRT name and signature that the executor uses exists in every release that it says it supports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import api

TENSORRT = Path(__file__).resolve().parents[2] / "runtime" / "executors" / "tensorrt"
MODULES = ("library", "builder", "graph", "loading", "session")
WHEELS = ("10.16.0.72", "11.0.0.114", "11.4.0.106")
RELEASES = ("tensorrt-10.16", "tensorrt-11.0", "tensorrt-11.4")

_LIBRARY_OBJECT = re.compile(
    r"(^|\.)(_trt|module(\.[A-Z]\w+)?|network|layer|builder|profile|context|_prefill|engine|refitter|runtime)$"
)
_BUILDER_CONFIG = re.compile(r"^config$")
_OURS = frozenset({"__version__", "graph", "profiles", "exists"})
"""Members of our own objects with such names (a path, a written network), and of every Python module."""


def _used_expressions(module: str) -> Iterator[tuple[ast.Attribute, ast.AST | None]]:
    """Attributes of library objects in one of our modules, with the call around them if there is one."""
    tree = ast.parse((TENSORRT / f"{module}.py").read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    known_config = {*api.MEMBERS["IBuilderConfig"], *api.MEMBERS["IRuntimeConfig"]}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr in _OURS:
            continue
        base = ast.unparse(node.value)
        if _LIBRARY_OBJECT.search(base) or (_BUILDER_CONFIG.match(base) and node.attr in known_config):
            yield node, calls.get(id(node))


def _names(member: str) -> list[str]:
    """``Class.member`` of a member name, or the class itself."""
    return (
        [member]
        if member in api.MEMBERS
        else [f"{owner}.{member}" for owner in api.MEMBERS if member in api.MEMBERS[owner]]
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_library_name_in_the_code_is_in_the_table(module: str) -> None:
    used = {node.attr for node, _ in _used_expressions(module)}
    assert len(used) >= 5
    assert [member for member in sorted(used) if not _names(member)] == []


@pytest.mark.parametrize("release", RELEASES)
def test_release_has_every_name_that_the_adapter_does_not_guard(release: str) -> None:
    recorded = api.load_recorded(release)
    wanted = set(api.MEMBERS) | {f"{owner}.{member}" for owner, members in api.MEMBERS.items() for member in members}
    assert wanted - recorded.keys() == api.ABSENT[release]


def test_installed_rtx_has_every_name_that_the_adapter_does_not_guard() -> None:
    module = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    if not module.__version__.startswith("1.7."):
        pytest.skip(f"tensorrt_rtx {module.__version__} is installed; the table is of 1.7")
    recorded = api.record(module)
    wanted = set(api.MEMBERS) | {f"{owner}.{member}" for owner, members in api.MEMBERS.items() for member in members}
    assert wanted - recorded.keys() == api.ABSENT["tensorrt_rtx-1.7"]
    _check_calls(recorded)


@pytest.mark.parametrize("release", RELEASES)
def test_calls_fit_the_signatures_of_a_release(release: str) -> None:
    _check_calls(api.load_recorded(release))


def _check_calls(recorded: dict[str, list[api.Signature] | None]) -> None:
    checked = 0
    for module in MODULES:
        for node, call in _used_expressions(module):
            signatures = [signature for name in _names(node.attr) for signature in recorded.get(name) or []]
            if node.attr in api.MEMBERS:  # a class that is called: its constructor
                signatures = recorded.get(f"{node.attr}.__init__") or []
            if isinstance(call, ast.Call) and signatures and not any(isinstance(arg, ast.Starred) for arg in call.args):
                assert not call.keywords, ast.unparse(call)
                fits = [len(one["required"]) <= len(call.args) <= len(one["names"]) for one in signatures]
                assert any(fits), (module, ast.unparse(call), signatures)
                checked += 1
    assert checked >= 40


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_recorded_release_is_what_its_wheel_says(version: str, tmp_path: Path) -> None:
    """Downloads the bindings (1.3 MB) from the package index, or takes them from PHALANX_TENSORRT_WHEELS."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    folder = Path(os.environ.get("PHALANX_TENSORRT_WHEELS", tmp_path))
    if not (found := list(folder.glob(f"tensorrt_cu13_bindings-{version}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
        subprocess.run([*command, f"tensorrt-cu13-bindings=={version}"], check=True, timeout=240)
        found = list(tmp_path.glob("*.whl"))
    assert api.record_wheel(found[0]) == api.load_recorded(api.release_of(found[0]))
