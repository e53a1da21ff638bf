# SPDX-License-Identifier: Apache-2.0
"""A family that Phalanx does not ship: from the operator's Python file, or from an installed package.

The file runs with the rights of the command that names it, as any script does. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Family, Model
from phalanx.runtime.models.family_fields import check_family, naming
from phalanx.runtime.models.hf_config import ConfigReader

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["API_VERSION", "ENTRY_POINTS", "ModelCode", "installed_model", "model_from_file", "shared_model"]

API_VERSION = 1
"""Of `phalanx.models`. Additions with defaults keep it; whatever breaks a user's file raises it."""

ENTRY_POINTS = "phalanx.models"
"""Group of entry points: ``MyForCausalLM = "my_package.my_model"``."""

_MOST_BYTES = 1 << 20
_FOUND, _MISTAKE, _NONE = b"+", b"-", b"0"


@dataclass(frozen=True, slots=True)
class ModelCode:
    """The text of a model file, and its name for messages."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text: what logs, split manifests and engine keys call it by."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def model_from_file(path: Path | None) -> Model | None:
    """The family that the file at ``path`` defines; None without a path.

    Raises:
        ConfigError: the file cannot be read or run, or defines no family for this version of `phalanx.models`.
    """
    return None if path is None else _model(_read(path))


def shared_model(path: Path | None, world: Communicator) -> Model | None:
    """As `model_from_file`, of the text that rank 0 reads: ranks cannot run different files. *Collective.*

    Raises:
        ConfigError: as `model_from_file`, on every rank.
    """
    from phalanx.parallel.communicator import broadcast_bytes  # not above: launch.plan runs without NumPy

    message = _NONE
    if world.rank == 0 and path is not None:
        try:
            code = _read(path)
            message = _FOUND + f"{code.name}\0{code.text}".encode()
        except ConfigError as error:
            message = _MISTAKE + str(error).encode()
    kind, text = (received := broadcast_bytes(world, message))[:1], received[1:].decode()
    if kind == _MISTAKE:
        raise ConfigError(text)
    return None if kind == _NONE else _model(ModelCode(*text.split("\0", 1)))


def installed_model(architectures: Sequence[str]) -> Model | None:
    """The family that an installed package offers for one of ``architectures`` as an entry point; None if none does.

    Raises:
        ConfigError: two packages offer it, or its module is no family for this version of `phalanx.models`.
    """
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.name in architectures]
    if not found:
        return None
    if len(found) > 1:
        packages = ", ".join(sorted(entry.value for entry in found))
        raise ConfigError(f"{found[0].name} is offered by several packages: {packages}; uninstall all but one")
    module = found[0].load()
    if not isinstance(module, ModuleType) or not module.__file__:
        raise ConfigError(
            f"the entry point {found[0].name} = {found[0].value} is not a module with a file; name the module"
        )
    return _checked(module, _read(Path(module.__file__)))


def _read(path: Path) -> ModelCode:
    try:
        data = path.read_bytes()
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"--model-file {path} has {len(data)} bytes; a model file has at most {_MOST_BYTES}")
        return ModelCode(path.name, data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--model-file {path} cannot be read: {error.strerror}; give a Python file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--model-file {path} is not UTF-8 text; give a Python file") from None


def _model(code: ModelCode) -> Model:
    """Run ``code`` in a fresh module and take its ``MODEL``."""
    module = ModuleType(f"phalanx_model_file_{code.digest[:16]}")
    module.__file__ = code.name
    sys.modules[module.__name__] = module  # dataclasses look their module up
    linecache.cache[code.name] = (len(code.text), None, code.text.splitlines(keepends=True), code.name)
    try:
        exec(compile(code.text, code.name, "exec"), module.__dict__)  # noqa: S102  the operator named the file to run it
    except SyntaxError as error:
        raise ConfigError(f"{code.name} line {error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == code.name]
        where = f" line {lines[-1]}" if lines else ""
        raise ConfigError(f"{code.name}{where}: {type(error).__name__}: {error}") from error
    return _checked(module, code)


def _checked(module: ModuleType, code: ModelCode) -> Model:
    version: Any = getattr(module, "PHALANX_API", None)
    if version is None:
        raise ConfigError(
            f"{code.name} does not say for which version of phalanx.models it is; add PHALANX_API = {API_VERSION}"
        )
    if version != API_VERSION:
        raise ConfigError(
            f"{code.name} is for version {version!r} of phalanx.models, but this Phalanx has {API_VERSION}; adapt the file"
        )
    model: Any = getattr(module, "MODEL", None)
    if not isinstance(model, Family):
        raise ConfigError(
            f"{code.name} defines no MODEL; set it to the Family, for example MODEL = replace(LLAMA, ...)"
        )
    with naming(f"{code.name}, MODEL"):
        check_family(model)
    return replace(model, code=code.digest, read_fields=_checked_reading(model, code.name))


def _checked_reading(model: Model, name: str) -> Callable[[ConfigReader], ModelConfig]:
    """Its ``read_fields``, of which whatever it raises or returns is one sentence."""

    def read_fields(reader: ConfigReader) -> ModelConfig:
        try:
            config = model.read_fields(reader)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{name}, read_fields: {type(error).__name__}: {error}") from error
        if not isinstance(config, ModelConfig):
            raise ConfigError(f"{name}, read_fields returns {type(config).__name__}, not a ModelConfig")
        return config

    return read_fields
