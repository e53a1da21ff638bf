# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.tensorrt.device import compute_capability
from phalanx.runtime.executors.tensorrt.library import Flavour, TensorRT, library_warnings_ignored
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8

__all__ = ["load_tensorrt"]

_MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_RELEASES: dict[Flavour, tuple[tuple[tuple[int, int], tuple[int, int]], ...]] = {
    "tensorrt": (((8, 6), (8, 7)), ((10, 16), (12, 0))),
    "tensorrt_rtx": (((1, 7), (2, 0)),),
}
"""The first release of each range, and the first after it."""

_INSTALL = (
    "install one: pip install -e '.[tensorrt]' (data centre GPUs) or '.[tensorrt-rtx]' (RTX GPUs) in Phalanx's checkout"
)


def load_tensorrt() -> TensorRT:
    """The TensorRT that is installed; of two, the one that can do something on this machine.

    Raises:
        ConfigError: there is none, its libraries are missing, or its release is not supported.
    """
    order: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
    if compute_capability() is None:
        order = ("tensorrt_rtx", "tensorrt")  # the only one that builds without a GPU
    reasons: list[str] = []
    for flavour in order:
        for name in _MODULES[flavour]:
            module = _import(name, reasons)
            if module is not None:
                return _checked(module, flavour)
    found = f"found {'; '.join(reasons)}" if reasons else "none is installed"
    raise ConfigError(f"--engine tensorrt needs TensorRT, but {found}; {_INSTALL}")


def _import(name: str, reasons: list[str]) -> ModuleType | None:
    try:
        with library_warnings_ignored():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            reasons.append(f"{name}, which lacks {error.name}")
    except (ImportError, OSError) as error:
        reasons.append(f"{name}, whose libraries do not load ({error})")
    return None


def _checked(module: ModuleType, flavour: Flavour) -> TensorRT:
    version = str(module.__version__)
    release = tuple(int(part) for part in version.split(".")[:2])
    if not any(lowest <= release < limit for lowest, limit in _RELEASES[flavour]):
        ranges = (f"at least {a[0]}.{a[1]} and below {b[0]}.{b[1]}" for a, b in reversed(_RELEASES[flavour]))
        raise ConfigError(f"{flavour} {version} is installed, but Phalanx needs {', or '.join(ranges)}; {_INSTALL}")
    if release < (10, 0) and flavour == "tensorrt":
        return TensorRT8.of(module)
    return TensorRT(module, flavour, version)
