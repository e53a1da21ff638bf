# SPDX-License-Identifier: Apache-2.0
"""A directory of engines: file names, the key that says what they were built from, and checks before one is loaded.

<model>_<dtype>_tp<T>_pp<P>_rank<R>.engine     one plan a rank
config.json                                    what they were built from, and for what
model.cache                                    the library's timing cache
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.checkpoints.checkpoint import Checkpoint, content_checksum
from phalanx.checkpoints.dummy import DummySource
from phalanx.kernels.compiler import cache_directory
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.tensorrt.builder import BuildRequest, replace_file
from phalanx.runtime.executors.tensorrt.formats import network_weights, quantised_formats
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.network import NetworkShape

__all__ = ["EngineDirectory", "EngineIdentity", "identify", "weights_checksum"]

_FORMAT = 2
"""Raise it when networks change so that engines built before must not be used."""

_REBUILD = "build it again with phalanx build"


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Everything that decides what an engine computes and where it runs.

    Attributes:
        weights: checksum of the checkpoint; empty for stripped engines, which take any weights of these shapes.
        library: name and version of the TensorRT.
        targets: compute capabilities.
        model_code: digest of the file that defines the family; empty for built-in ones.
        formats: of quantised weights, each once: ``quantization_config`` or ``--quantize`` decides what the same tensors mean.
    """

    config: ModelConfig
    shape: NetworkShape
    layout: Layout
    weights: str
    library: str
    targets: tuple[str, ...]
    model_code: str = ""
    formats: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """As values that JSON gives back equal, one to one with what `key` covers. Token ids of the tokenizer do not matter."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        for name in ("bos_token_id", "eos_token_ids"):
            del config[name]
        fields = {
            "format": _FORMAT,
            "model_config": config,
            "tensor_parallel_size": self.layout.tp,
            "pipeline_parallel_size": self.layout.pp,
            **dataclasses.asdict(self.shape),
            "weights_checksum": self.weights,
            "tensorrt": self.library,
            "target_compute_capabilities": list(self.targets),
            **({"model_code": self.model_code} if self.model_code else {}),
            **({"formats": list(self.formats)} if self.formats else {}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(fields))  # tuples as lists, as they are read back
        return plain

    @property
    def key(self) -> str:
        """A digest of `fields`: engines with the same key can stand for each other."""
        text = json.dumps(self.fields(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class EngineDirectory:
    """Engines of one model in one layout.

    Attributes:
        model_name: first part of the file names.
    """

    path: Path
    model_name: str

    @staticmethod
    def of(path: Path, checkpoint: Path) -> EngineDirectory:
        """The directory ``path`` to build into, its files named after the checkpoint's directory."""
        return EngineDirectory(path, re.sub(r"[^A-Za-z0-9.-]+", "-", checkpoint.resolve().name) or "model")

    @staticmethod
    def existing(path: Path) -> EngineDirectory:
        """The directory ``path`` that engines were built into, from a checkpoint of whatever name.

        Raises:
            ConfigError: there are no engines, or ``config.json`` is damaged.
        """
        return EngineDirectory(path, str(EngineDirectory(path, "").read_config().get("model_name")))

    @property
    def config_path(self) -> Path:
        """``config.json``."""
        return self.path / "config.json"

    @property
    def timing_cache(self) -> Path:
        """``model.cache``."""
        return self.path / "model.cache"

    def engine(self, identity: EngineIdentity, rank: int) -> Path:
        """The plan of ``rank`` (pipeline stage x tp + tensor-parallel rank)."""
        layout = identity.layout
        name = f"{self.model_name}_{identity.shape.dtype}_tp{layout.tp}_pp{layout.pp}_rank{rank}.engine"
        return self.path / name

    def prepare(self, identity: EngineIdentity) -> list[Path]:
        """Make the directory ready for engines of ``identity``; returns the stale ones of the same names, which are removed.

        So whatever lies here is what ``config.json`` says, however many processes build its ranks.

        Raises:
            ConfigError: there are engines of another model, type or layout.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        key = self.read_config()["key"] if self.config_path.exists() else None
        stale: list[Path] = []
        if key != identity.key:
            names = {self.engine(identity, rank).name for rank in range(identity.layout.world_size)}
            stale = sorted(self.path.glob("*.engine"))
            if others := [engine.name for engine in stale if engine.name not in names]:
                raise ConfigError(f"{self.path} holds other engines ({others[0]}); use another --output")
            for engine in stale:
                engine.unlink(missing_ok=True)
            self._write_config(identity)
        return stale

    def _write_config(self, identity: EngineIdentity) -> None:
        content = {"key": identity.key, "model_name": self.model_name, **identity.fields()}
        replace_file(self.config_path, (json.dumps(content, indent=2) + "\n").encode())

    def read_config(self) -> dict[str, Any]:
        """What the engines here are.

        Raises:
            ConfigError: there are none, or ``config.json`` is damaged.
        """
        try:
            config = json.loads(self.config_path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} holds no engines (no config.json); make them with phalanx build") from None
        except ValueError as error:
            raise ConfigError(f"{self.config_path} is damaged ({error}); {_REBUILD}") from None
        if not isinstance(config, dict) or "key" not in config:
            raise ConfigError(f"{self.config_path} was not written by phalanx build; {_REBUILD}")
        return config

    def read_shape(self) -> NetworkShape:
        """The sizes that the engines here were built for.

        Raises:
            ConfigError: `read_config` does, or a size is missing.
        """
        config = self.read_config()
        names = [field.name for field in dataclasses.fields(NetworkShape)]
        if missing := [name for name in names if name not in config]:
            raise ConfigError(f"{self.config_path} lacks {', '.join(missing)}; {_REBUILD}")
        return NetworkShape(**{name: config[name] for name in names})

    def check(self, identity: EngineIdentity, rank: int, capability: str) -> Path:
        """The plan of ``rank``, after making sure that it is what ``identity`` describes and runs on this GPU.

        Raises:
            ConfigError: it is missing, stale, of another TensorRT or for another GPU: what differs, and what to do.
        """
        config = {"formats": [], **self.read_config()}
        wanted = {"formats": [], **identity.fields()}
        if capability not in config.get("target_compute_capabilities", []):
            raise ConfigError(
                f"the engines in {self.path} were built for compute capability "
                f"{', '.join(config.get('target_compute_capabilities', []))}, but this GPU has {capability}; "
                f"build them here, or with --target-compute-capability {capability}"
            )
        for name, value in wanted.items():
            if name != "target_compute_capabilities" and config.get(name) != value:
                raise ConfigError(_difference(self.path, name, config.get(name), value))
        engine = self.engine(identity, rank)
        if not engine.exists():
            raise ConfigError(f"{engine.name} is missing from {self.path}; build it with phalanx build --rank {rank}")
        return engine


def _difference(path: Path, name: str, found: Any, wanted: Any) -> str:
    if name == "tensorrt":
        return f"the engines in {path} were built by {found}, but {wanted} is installed here; {_REBUILD}"
    if name == "weights_checksum":
        return f"the engines in {path} are stale: the checkpoint's weights changed since they were built; {_REBUILD}"
    if name == "formats":
        return f"the engines in {path} are stale: the checkpoint's quantization_config, or --quantize, changed since they were built; {_REBUILD}"
    if isinstance(found, dict) and isinstance(wanted, dict):
        name, found, wanted = next(
            (f"{name}.{inner}", found.get(inner), value) for inner, value in wanted.items() if found.get(inner) != value
        )
    return f"the engines in {path} were built for {name}={found}, but {name}={wanted} is asked for; {_REBUILD}"


def weights_checksum(checkpoint: Checkpoint, memory: Path) -> str:
    """Identity of a checkpoint's weights. Remembered in ``memory`` until a file changes its size or time."""
    if isinstance(checkpoint.source, DummySource):
        return content_checksum(checkpoint.source)
    files = sorted(checkpoint.path.glob("*.safetensors"))
    stamps = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    stamp = hashlib.blake2b(repr((str(checkpoint.path.resolve()), stamps)).encode(), digest_size=16).hexdigest()
    remembered = memory / f"{stamp}.checksum"
    if remembered.exists():
        return remembered.read_text().strip()
    checksum = content_checksum(checkpoint.source)
    memory.mkdir(parents=True, exist_ok=True)
    replace_file(remembered, checksum.encode())
    return checksum


def identify(checkpoint: Checkpoint, request: BuildRequest, layout: Layout, library: TensorRT) -> EngineIdentity:
    """What engines built from these choices are. Reads the checkpoint, unless its checksum is remembered."""
    weights = "" if request.stripped else weights_checksum(checkpoint, cache_directory() / "checksums")
    return EngineIdentity(
        request.config, request.shape, layout, weights, library.name, request.targets, request.model.code,
        quantised_formats(network_weights(request.model, request.config, request.formats, request.quantize)),
    )  # fmt: skip
