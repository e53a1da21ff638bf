# SPDX-License-Identifier: Apache-2.0
"""What must be the same on every rank, compared before any rank computes: other weights on one node give garbage, not an error."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

import phalanx.checkpoints
import phalanx.parallel
import phalanx.runtime
from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.checkpoints.identity import checkpoint_identity
from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import EngineConfig, ModelConfig
from phalanx.runtime.executors.registry import choose_engine
from phalanx.runtime.models import Model
from phalanx.runtime.models.shapes import use_of

__all__ = ["check_ranks_agree"]

_MAY_DIFFER = ("engine_dir", "model_file")
"""Options that say where a host keeps something."""


def check_ranks_agree(
    checkpoint: Checkpoint, options: EngineConfig, world: Communicator, model: Model, config: ModelConfig
) -> None:
    """Compare every rank with rank 0: files, options, version, and of a family that is not built in its text and what it does. *Collective.*

    Raises:
        ConfigError: on every rank, naming the first rank that differs and all in which it does.
    """
    if world.size == 1:
        return
    own = (
        socket.gethostname(),
        {**_options(options), **checkpoint_identity(checkpoint), **_sources(), **_of_a_file(model, config)},
    )
    rows = gather_bytes(world, msgspec.msgpack.encode(own))
    everyone = [msgspec.msgpack.decode(row, type=tuple[str, dict[str, str]]) for row in rows]
    first = everyone[0][1]
    for rank, (host, facts) in enumerate(everyone):
        if differences := _differences(first, facts):
            raise ConfigError(
                f"rank {rank} on {host} and rank 0 on {everyone[0][0]} differ in {', '.join(differences)}; "
                "give every rank the same checkpoint, options and version of Phalanx"
            )


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    found = []
    for name in (*first, *(name for name in other if name not in first)):
        mine, theirs = first.get(name, "none"), other.get(name, "none")
        if mine != theirs:
            found.append(f"{name} ({theirs} and {mine})")
    return found


def _options(options: EngineConfig) -> dict[str, str]:
    """With the engine that ``auto`` becomes here: engines of two kinds would wait for each other in different collectives."""
    names = (field.name for field in dataclasses.fields(options) if field.name not in _MAY_DIFFER)
    found = {name: str(getattr(options, name)) for name in names}
    if options.engine != "auto":
        return found
    return {"the engine that auto becomes, which --engine settles,": choose_engine("auto"), **found}


def _of_a_file(model: Model, config: ModelConfig) -> dict[str, str]:
    """The same text can do different things where it asks for more than its arguments, such as the environment."""
    if not model.code:
        return {}
    use = use_of(model, config)
    does = repr((model.weights(config), use.calls, list(use.weights)))
    return {
        "the model's code": model.code,
        "what the model file does, which must depend on its arguments alone,": hashlib.sha256(
            does.encode()
        ).hexdigest()[:16],
    }


def _sources() -> dict[str, str]:
    """The version, and a digest of the modules that ranks run together: checkouts of one version may differ."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (phalanx.checkpoints, phalanx.parallel, phalanx.runtime):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {"the version of Phalanx": phalanx.__version__, "the source files of Phalanx": digest.hexdigest()}
