"""What a server must not contain: nothing that runs code out of data, and no pickles on a wire."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("runtime", "parallel", "checkpoints", "kernels", "launch", "package")
PICKLING = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BY_PICKLE = {
    "bcast", "send", "isend", "ssend", "recv", "irecv", "sendrecv", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce",
}  # fmt: skip
"""Methods of mpi4py's communicators that pickle; those with a capital letter move buffers."""
RUNS_A_FILE = {"runtime/models/user_file.py": {"exec"}}
"""The file that an operator names with --model-file is a program; it comes from the command line, never from a checkpoint."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    return dict(sources())


def imported(tree: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_module_that_pickles_is_imported(modules: dict[str, ast.Module]) -> None:
    assert {name: used for name, tree in modules.items() if (used := imported(tree) & PICKLING)} == {}


def test_no_text_is_run_as_a_program(modules: dict[str, ast.Module]) -> None:
    found = {
        name: used
        for name, tree in modules.items()
        if (used := {call.func.id for call in calls(tree) if isinstance(call.func, ast.Name)} & {"eval", "exec"})
    }
    assert found == RUNS_A_FILE


def test_files_of_pytorch_are_read_as_weights_only(modules: dict[str, ast.Module]) -> None:
    loads = [call for tree in modules.values() for call in calls(tree) if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        assert "weights_only=True" in [ast.unparse(word) for word in call.keywords]


def test_mpi_moves_buffers_only(modules: dict[str, ast.Module]) -> None:
    with_mpi = {name: tree for name, tree in modules.items() if "mpi4py" in imported(tree)}
    assert with_mpi
    for name, tree in with_mpi.items():
        used = {call.func.attr for call in calls(tree) if isinstance(call.func, ast.Attribute)}
        assert not used & BY_PICKLE, name
