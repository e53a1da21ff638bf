"""How much of the source a reader passes on the ways that matter, and how tangled it is.

Works on any revision, so that a change of structure can be measured before and after:

    git worktree add /tmp/before REVISION
    python -m tools.measure_structure /tmp/before .

The environment that runs it must have Phalanx's dependencies. What is counted:

* files and lines from an HTTP body to the sampler: distinct source files, and lines of the functions, that run in the
  HTTP process and on rank 0 between a completion request and its answer;
* files entered while an executor is assembled: from `create_executor` to its return, NumPy engine;
* import circles: groups of modules that import each other, imports for type checking counted;
* the folder with the most modules;
* files that name a sampling field (``min_p``), without tests.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = ("runtime", "parallel", "kernels", "launch", "checkpoints")
SAMPLING_FIELD = "min_p"

RECORDER = """
import atexit, os, sys, threading
ROOT, FLAG, OUT = os.environ["MEASURE_ROOT"], os.environ["MEASURE_FLAG"], os.environ["MEASURE_OUT"]
START = os.environ.get("MEASURE_FUNCTION")
seen, depth = set(), 0
def record(frame, event, argument):
    global depth
    code = frame.f_code
    if START and code.co_name == START:
        depth += (event == "call") - (event == "return")
    if event == "call" and code.co_filename.startswith(ROOT) and "site-packages" not in code.co_filename and (depth if START else os.path.exists(FLAG)):
        if code not in seen:
            seen.add(code)
            lines = {line for _, _, line in code.co_lines() if line}
            with open(f"{OUT}.{os.getpid()}", "a") as out:
                out.write(f"{os.path.realpath(code.co_filename)} {len(lines)}\\n")
sys.setprofile(record)
threading.setprofile(record)
"""


def modules(tree: Path) -> dict[str, Path]:
    """Dotted name below the root package -> file."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((tree / folder).rglob("*.py")):
            parts = path.relative_to(tree).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules of the tree that ``path`` imports when it is loaded or type-checked; not those inside functions."""
    found: set[str] = set()
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.If, ast.Try)):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("phalanx.") for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("phalanx.")
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names}
    return {target for target in found if target in known and target != name}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def environment(tree: Path, folder: Path, function: str = "") -> dict[str, str]:
    """Environment of a recorded process: the tree's own packages first, the recorder as ``sitecustomize``."""
    (folder / "sitecustomize.py").write_text(RECORDER)
    own = {
        "PYTHONPATH": f"{folder}:{tree}/tools/tree:{tree}",
        "MEASURE_ROOT": str(tree),
        "MEASURE_FLAG": str(folder / "recording"),
        "MEASURE_OUT": str(folder / "seen"),
        "MEASURE_FUNCTION": function,
    }
    return os.environ | own


def recorded(folder: Path) -> tuple[int, int]:
    """Distinct files, and lines of functions, that the recorded processes entered."""
    rows: set[str] = set()
    for path in folder.glob("seen.*"):
        rows |= set(path.read_text().splitlines())
    return len({row.rsplit(" ", 1)[0] for row in rows}), sum(int(row.rsplit(" ", 1)[1]) for row in rows)


def request_path(tree: Path) -> tuple[int, int]:
    """Files and lines that one completion request passes, HTTP process and rank 0 together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "launch.serve", "--port", "0", "--engine", "numpy"]
        server = subprocess.Popen(
            command,
            cwd=tree,
            env=environment(tree, folder),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert server.stderr is not None
        url = next(match.group(1) for line in server.stderr if (match := re.search(r"READY (http://\S+)", line)))
        time.sleep(1)  # what start-up leaves to do
        (folder / "recording").touch()
        body = json.dumps({"model": "phalanx-demo", "prompt": "def main(", "max_tokens": 4, "temperature": 0.7})
        request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200
        (folder / "recording").unlink()
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
        server.wait(60)
        return recorded(folder)


def assembly_path(tree: Path) -> int:
    """Files entered while `create_executor` runs for the demo checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = "from phalanx import LLM\nwith LLM(engine='numpy'): pass"
        subprocess.run(
            [sys.executable, "-c", program], cwd=tree, env=environment(tree, folder, "create_executor"), check=True
        )
        return recorded(folder)[0]


def rows(tree: Path) -> Iterator[tuple[str, str]]:
    """What is counted of one tree, with its name."""
    known = modules(tree)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    sizes: dict[Path, int] = {}
    for path in known.values():
        if path.name != "__init__.py":
            sizes[path.parent] = sizes.get(path.parent, 0) + 1
    largest = max(sizes, key=lambda folder: sizes[folder])
    field = re.compile(rf"\b{SAMPLING_FIELD}s?\b")
    sources = [
        path for folder in FOLDERS for path in (tree / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh")
    ]
    num_files, num_lines = request_path(tree)
    yield "HTTP body to sampler: files", str(num_files)
    yield "HTTP body to sampler: lines of functions", str(num_lines)
    yield "an executor assembled: files", str(assembly_path(tree))
    found = circles(graph)
    yield "import circles (modules in them)", f"{len(found)} ({sum(map(len, found))})"
    yield "largest folder: modules", f"{sizes[largest]} ({largest.relative_to(tree)})"
    yield f"files that name {SAMPLING_FIELD}", str(sum(bool(field.search(path.read_text())) for path in sources))


def main() -> None:
    """Print a table with a column for each tree of the command line."""
    trees = [Path(argument).resolve() for argument in sys.argv[1:]] or [Path.cwd()]
    for tree in trees:
        if not (tree / FOLDERS[0]).is_dir():
            sys.exit(f"{tree} is not a checkout; give directories, for a revision those of git worktree add")
    columns = [dict(rows(tree)) for tree in trees]
    print("| | " + " | ".join(tree.name for tree in trees) + " |")
    print("|---" * (len(trees) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
