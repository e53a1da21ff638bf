"""A `Library` that runs the kernels on the CPU: each specialisation is compiled by g++ against `emulator/`.

The same wrappers and the same sources as on a GPU, over NumPy arrays, so the kernels' arithmetic and indexing are checked
where there is no GPU. What only a GPU can show (memory ordering, occupancy, speed) is for `tests/gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.kernels.compiler import INCLUDE_DIRECTORY, KernelSpec, load_source
from phalanx.kernels.library import KernelFunction

EMULATOR = Path(__file__).parent / "emulator"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-w", "-ffp-contract=off")


class EmulatedLibrary:
    """Kernels compiled for the CPU, kept in ``cache`` between runs and shared by the test processes of one run."""

    def __init__(self, cache: Path, num_multiprocessors: int = 4, has_clusters: bool = False) -> None:
        self.architecture = "sm_80"
        self.num_multiprocessors = num_multiprocessors
        self.has_clusters = has_clusters
        self._cache = cache
        self._libraries: dict[KernelSpec, ctypes.CDLL] = {}

    def function(self, source: str, name: str, shared_bytes: int = 0, **defines: str | int | float) -> KernelFunction:
        """As `KernelLibrary.function`."""
        spec = KernelSpec.of(source, defines)
        if spec not in self._libraries:
            self._libraries[spec] = ctypes.CDLL(str(self._compiled(spec)))
        entry = getattr(self._libraries[spec], f"launch_{name}")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
            assert shared_mem <= max(shared_bytes, 48 * 1024), (shared_mem, shared_bytes)
            cells = [_cell(argument) for argument in args]
            pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
            assert all(blocks <= 65_535 for blocks in grid[1:]), f"CUDA launches no grid of {grid} blocks"
            shape = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
            if entry(pointers, shape, ctypes.c_size_t(shared_mem)) != 0:
                raise AssertionError(f"{source}.cu: {name} deadlocks: threads of a block wait at different places")

        return launch

    def _compiled(self, spec: KernelSpec) -> Path:
        source = load_source(spec.source)
        emulator = b"".join(path.read_bytes() for path in sorted(EMULATOR.iterdir()))
        key = hashlib.sha256(repr((source.digest, spec.options, emulator, _FLAGS)).encode()).hexdigest()[:24]
        path = self._cache / f"{spec.source}-{key}.so"
        with _one_process_at_a_time(path):
            if not path.exists():
                self._compile(spec, source.text, path)
        return path

    def _compile(self, spec: KernelSpec, text: str, path: Path) -> None:
        exports = "".join(f"EXPORT_KERNEL({name})\n" for name in _kernel_names(text))
        blocks = dict(spec.defines).get("CLUSTER", "1")
        program = f'#include "cuda_emulator.h"\n#define BLOCKS_PER_CLUSTER {blocks}\n{text}\n{exports}'
        headers, scheduler = self._headers(), self._scheduler()
        partial = path.with_suffix(f".{os.getpid()}")
        command = ["g++", *_FLAGS, *spec.options, f"-I{headers}", "-shared", "-o", str(partial), "-x", "c++", "-"]
        subprocess.run([*command, "-x", "none", str(scheduler)], input=program, text=True, check=True)
        partial.rename(path)

    def _scheduler(self) -> Path:
        """The emulator's scheduler as a library of its own, which all kernels share."""
        source, header = EMULATOR / "cuda_emulator.cpp", EMULATOR / "cuda_emulator.h"
        key = hashlib.sha256(source.read_bytes() + header.read_bytes()).hexdigest()[:16]
        path = self._cache / f"libemulator-{key}.so"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            subprocess.run(["g++", *_FLAGS, "-O2", "-shared", str(source), "-o", str(partial)], check=True)
            partial.rename(path)
        return path

    def _headers(self) -> Path:
        """A folder with the package's headers and, in place of some of them, the emulator's."""
        headers = {path.name: path.read_text() for folder in (INCLUDE_DIRECTORY, EMULATOR) for path in folder.iterdir()}
        folder = self._cache / f"include-{hashlib.sha256(repr(sorted(headers.items())).encode()).hexdigest()[:16]}"
        if not folder.exists():
            partial = folder.with_suffix(f".{os.getpid()}")
            partial.mkdir(parents=True)
            for name, text in headers.items():
                (partial / name).write_text(text)
            # Precompiled it saves half of the time of a small kernel, of which there are hundreds.
            header = partial / "cuda_emulator.h"
            subprocess.run(["g++", *_FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(folder)
        return folder


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kernel_names(text: str) -> list[str]:
    import re

    return re.findall(r'extern "C" __global__ void (?:CLUSTER_DIMENSIONS )?__launch_bounds__\([^)]*\)\s*(\w+)\(', text)


def _cell(argument: Any) -> Any:
    """A ctypes object that holds one kernel argument's value."""
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    assert isinstance(argument, np.generic), f"pass {type(argument).__name__} as a NumPy scalar: CUDA needs its width"
    return (ctypes.c_char * argument.dtype.itemsize).from_buffer_copy(argument.tobytes())
