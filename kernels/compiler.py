# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ to machine code by NVRTC, with a cache on disk. Compiling needs no GPU and no CUDA toolkit.

The cache key covers everything that decides the result: the kernel's source and every package header it includes,
the options, the architecture and the compiler's version. An entry carries its own checksum, so a torn or damaged file
is compiled again instead of being loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.parallel.errors import ConfigError, ExecutorError

__all__ = [
    "FIRST_WITH_FP8",
    "KernelSource",
    "KernelSpec",
    "architecture_name",
    "cache_directory",
    "compile_cubin",
    "load_source",
]

SOURCE_DIRECTORY = Path(__file__).parent
INCLUDE_DIRECTORY = SOURCE_DIRECTORY / "include"
OLDEST_COMPUTE_CAPABILITY = 80
FIRST_WITH_FP8 = 89
"""Compute capability whose tensor cores multiply fp8."""
_INCLUDE_LINE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_DIGEST_BYTES = 32
# Without -default-device some NVRTC take generic lambdas for host code.
_FLAGS = ("-std=c++17", "-lineinfo", "-default-device")


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One ``.cu`` file and a digest over it and the package headers that it includes, directly or not.

    ``overlaps_previous``: its kernels are written for programmatic dependent launch (they include ``launch.cuh``).
    """

    name: str
    text: str
    digest: str
    overlaps_previous: bool


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What to compile: a source name (``"norm"`` for ``norm.cu``) and its ``-D`` definitions, sorted by name."""

    source: str
    defines: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, source: str, defines: Mapping[str, str | int | float]) -> KernelSpec:
        """A spec from any mapping; equal contents give equal specs."""
        return cls(source, tuple(sorted((name, str(value)) for name, value in defines.items())))

    @property
    def options(self) -> tuple[str, ...]:
        """The definitions as compiler options."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)


def architecture_name(compute_capability: str) -> str:
    """NVRTC's name for a device: ``"90"`` gives ``"sm_90a"``, whose own instructions (wgmma) ``sm_90`` lacks.

    Raises ConfigError for anything before Ampere.
    """
    number = int(compute_capability)
    if number < OLDEST_COMPUTE_CAPABILITY:
        raise ConfigError(
            f"compute capability {number / 10:.1f} is below {OLDEST_COMPUTE_CAPABILITY / 10:.1f}; "
            "use an Ampere or later GPU, or --engine numpy"
        )
    return f"sm_{number}a" if number in (90, 100) else f"sm_{number}"


def cache_directory() -> Path:
    """``PHALANX_CACHE_DIR``, else ``~/.cache/phalanx``. Kernels and GEMM timings live below it."""
    configured = os.environ.get("PHALANX_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "phalanx"


def load_source(name: str) -> KernelSource:
    """Read ``<name>.cu`` of this package and digest it together with its package headers."""
    text = (SOURCE_DIRECTORY / f"{name}.cu").read_text()
    digest = hashlib.sha256(text.encode())
    headers = _headers_of(text)
    for header in sorted(headers):
        digest.update(header.encode() + (INCLUDE_DIRECTORY / header).read_bytes())
    return KernelSource(name, text, digest.hexdigest(), "launch.cuh" in headers)


def _headers_of(text: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    for header in _INCLUDE_LINE.findall(text):
        if header not in seen:
            seen = _headers_of((INCLUDE_DIRECTORY / header).read_text(), seen | {header})
    return seen


def compile_cubin(spec: KernelSpec, architecture: str, cache: Path | None = None) -> bytes:
    """Machine code of ``spec`` for ``architecture`` (``"sm_90a"``), from the cache where it is there.

    Safe with many ranks at once: one compiles while the others of the same host wait for its result.

    Raises ExecutorError with the compiler's log when the source does not compile, ConfigError when NVRTC is missing
    or does not know the architecture.
    """
    source = load_source(spec.source)
    key = "\n".join([source.digest, *spec.options, *_FLAGS, architecture, _nvrtc_version()])
    folder = (cache or cache_directory()) / "kernels"
    path = folder / f"{spec.source}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if (cubin := _read_entry(path)) is not None:
        return cubin
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if (cubin := _read_entry(path)) is None:
            cubin = _compile(source, (*spec.options, f"-arch={architecture}"))
            _write_entry(path, cubin)
    return cubin


def _read_entry(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write_entry(path: Path, cubin: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(hashlib.sha256(cubin).digest() + cubin)
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ConfigError(
            f"NVRTC's bindings cannot be imported ({error}); pip install -e '.[cuda13]' or '.[cuda12]' in Phalanx's checkout, or use --engine numpy"
        ) from error
    return nvrtc


def _check(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """The value of a binding call, which returns ``(status, value...)``."""
    status = result[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ExecutorError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return result[1] if len(result) == 2 else result[1:]


def _nvrtc_version() -> str:
    nvrtc = _nvrtc()
    try:
        major, minor = _check(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # the bindings' own error when libnvrtc cannot be found
        raise ConfigError(
            f"libnvrtc cannot be loaded ({error}); pip install -e '.[cuda13]' or '.[cuda12]' in Phalanx's checkout"
        ) from error
    return f"{major}.{minor}"


def _compile(source: KernelSource, options: tuple[str, ...]) -> bytes:
    nvrtc = _nvrtc()
    includes = (f"-I{INCLUDE_DIRECTORY}", *(f"-I{folder}" for folder in _toolkit_includes()))
    flags = [option.encode() for option in (*options, *_FLAGS, *includes)]
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram(source.text.encode(), f"{source.name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ExecutorError(f"{source.name}.cu does not compile with {' '.join(options)}:\n{_log(nvrtc, program)}")
        cubin = bytearray(_check(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    log = bytearray(_check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    _check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0").decode(errors="replace")


def _toolkit_includes() -> list[Path]:
    """Folders that hold ``cuda_fp16.h``: NVIDIA's wheels in this environment, then an installed toolkit."""
    import site

    packages = {Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    wheels = [folder / "nvidia" / part / "include" for folder in packages for part in ("cu13", "cuda_runtime")]
    toolkits = [
        Path(os.environ.get(variable, default)) / "include"
        for variable, default in (("CUDA_HOME", "/usr/local/cuda"), ("CUDA_PATH", "/usr/local/cuda"))
    ]
    found = [folder for folder in (*wheels, *toolkits) if (folder / "cuda_fp16.h").is_file()]
    if not found:
        raise ConfigError(
            "cuda_fp16.h is neither in NVIDIA's wheels nor under CUDA_HOME; install nvidia-cuda-runtime "
            "(nvidia-cuda-runtime-cu12 for CUDA 12) or set CUDA_HOME"
        )
    return found[:1]
