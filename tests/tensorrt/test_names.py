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
SEGMENT_MODULES = ("library8", "segments/plans", "segments/runner")
WHEELS = {"10.16.0.72": "tensorrt-cu13-bindings", "11.0.0.114": "tensorrt-cu13-bindings",
          "11.4.0.106": "tensorrt-cu13-bindings", "8.6.1": "tensorrt-bindings"}  # fmt: skip
RELEASES = ("tensorrt-10.16", "tensorrt-11.0", "tensorrt-11.4")

_LIBRARY_OBJECT = re.compile(
    r"(^|\.)(_trt|module(\.[A-Z]\w+)?|network|layer|_?builder|profile|context|_prefill|engine|refitter|_?runtime)$"
)
_BUILDER_CONFIG = re.compile(r"^config$")
_OURS = frozenset({"__version__", "graph", "profiles", "exists"})
"""Members of our own objects with such names (a path, a written network), and of every Python module."""


def _used_expressions(module: str) -> Iterator[tuple[ast.Attribute, ast.AST | None]]:
    """Attributes of library objects in one of our modules, with the call around them if there is one."""
    tree = ast.parse((TENSORRT / f"{module}.py").read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    known_config = {
        *api.MEMBERS["IBuilderConfig"], *api.MEMBERS["IRuntimeConfig"], *api.SEGMENT_MEMBERS["IBuilderConfig"],
    }  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr in _OURS:
            continue
        base = ast.unparse(node.value)
        if _LIBRARY_OBJECT.search(base) or (_BUILDER_CONFIG.match(base) and node.attr in known_config):
            yield node, calls.get(id(node))


def _names(member: str, members: dict[str, tuple[str, ...]] = api.MEMBERS) -> list[str]:
    """``Class.member`` of a member name, or the class itself."""
    return [member] if member in members else [f"{owner}.{member}" for owner in members if member in members[owner]]


@pytest.mark.parametrize("module", MODULES)
def test_every_library_name_in_the_code_is_in_the_table(module: str) -> None:
    used = {node.attr for node, _ in _used_expressions(module)}
    assert len(used) >= 5
    assert [member for member in sorted(used) if not _names(member)] == []


@pytest.mark.parametrize("module", SEGMENT_MODULES)
def test_every_library_name_of_segments_is_in_tensorrt_8(module: str) -> None:
    recorded = api.load_recorded("tensorrt-8.6")
    used = {node.attr for node, _ in _used_expressions(module)}
    assert len(used) >= 4
    assert [name for name in sorted(used) if not set(_names(name, api.SEGMENT_MEMBERS)) & recorded.keys()] == []


def test_tensorrt_8_has_every_name_that_segments_use() -> None:
    recorded, members = api.load_recorded("tensorrt-8.6"), api.SEGMENT_MEMBERS
    assert {*members, *(f"{owner}.{one}" for owner, names in members.items() for one in names)} == recorded.keys()


def test_calls_of_segments_fit_the_signatures_of_tensorrt_8() -> None:
    _check_calls(api.load_recorded("tensorrt-8.6"), SEGMENT_MODULES, api.SEGMENT_MEMBERS, at_least=8)


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


def _check_calls(
    recorded: dict[str, list[api.Signature] | None], modules: tuple[str, ...] = MODULES,
    members: dict[str, tuple[str, ...]] = api.MEMBERS, at_least: int = 40,
) -> None:  # fmt: skip
    checked = 0
    for module in modules:
        for node, call in _used_expressions(module):
            signatures = [signature for name in _names(node.attr, members) for signature in recorded.get(name) or []]
            if node.attr in members:  # a class that is called: its constructor
                signatures = recorded.get(f"{node.attr}.__init__") or []
            if isinstance(call, ast.Call) and signatures and not any(isinstance(arg, ast.Starred) for arg in call.args):
                assert not call.keywords, ast.unparse(call)
                fits = [len(one["required"]) <= len(call.args) <= len(one["names"]) for one in signatures]
                assert any(fits), (module, ast.unparse(call), signatures)
                checked += 1
    assert checked >= at_least


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_recorded_release_is_what_its_wheel_says(version: str, tmp_path: Path) -> None:
    """Downloads the bindings (1.3 MB) from the package index, or takes them from PHALANX_TENSORRT_WHEELS."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    folder = Path(os.environ.get("PHALANX_TENSORRT_WHEELS", tmp_path))
    package = WHEELS[version]
    if not (found := list(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
        subprocess.run([*command, f"{package}=={version}"], check=True, timeout=240)
        found = list(tmp_path.glob("*.whl"))
    assert api.record_wheel(found[0]) == api.load_recorded(api.release_of(found[0]))
