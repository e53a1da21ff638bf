# SPDX-License-Identifier: Apache-2.0
"""Where flags come from besides the command line: environment variables ``PHALANX_<FLAG>`` and ``--config FILE``.

The command line wins over the environment, the environment over the file. A file has the flags' names as keys, with ``-`` or
``_``; a table named after a command holds what only that command takes.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phalanx.parallel.errors import ConfigError

__all__ = ["PREFIX", "Settings", "variable_name"]

PREFIX = "PHALANX_"
_CONFIG = "--config"


@dataclass(frozen=True, slots=True)
class Settings:
    """What rank 0 was given.

    Attributes:
        words: the command line without the program.
        variables: environment variables that begin with ``PHALANX_``, but for those that Kubernetes sets.
        config_file: where ``config`` comes from, for messages.
        config: keys of the file, with ``-`` for ``_``.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    config_file: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, words: Sequence[str], command: str, environ: Mapping[str, str] = os.environ) -> Settings:
        """The words, and what environment and file add for ``command``.

        Raises:
            ConfigError: the file cannot be read, or it is not a table of flags.
        """
        variables = {
            name: value
            for name, value in environ.items()
            if name.startswith(PREFIX) and not _is_of_kubernetes(name, value)
        }
        name = _config_file(words)
        if name is None:
            name = variables.get(variable_name(_CONFIG), "")
        elif not name:
            raise ConfigError(f"{_CONFIG} names no file; give one, or leave it out")
        config = _for_command(_load(Path(name)), command, name) if name else {}
        return cls(tuple(words), variables, name, config)

    def encode(self) -> bytes:
        """For the other ranks. Values that only YAML and TOML have, such as dates, become the text that flags take anyway."""
        return json.dumps(asdict(self), default=str).encode()

    @classmethod
    def decode(cls, data: bytes) -> Settings:
        """The inverse of `encode`."""
        fields = json.loads(data)
        return cls(tuple(fields.pop("words")), **fields)


def variable_name(flag: str) -> str:
    """``--max-num-seqs -> PHALANX_MAX_NUM_SEQS``."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def _is_of_kubernetes(name: str, value: str) -> bool:
    """Whether a container got the variable because there is a Service called ``phalanx`` (``PHALANX_PORT=tcp://10.0.0.1:8000``)."""
    return (
        value.startswith(("tcp://", "udp://", "sctp://"))
        or re.search("_SERVICE_(HOST|PORT)|_PORT_[0-9]", name) is not None
    )


def _config_file(words: Sequence[str]) -> str | None:
    """The last ``--config FILE`` or ``--config=FILE``; None = there is none."""
    found = None
    for place, word in enumerate(words):
        if word == _CONFIG:
            found = "".join(words[place + 1 : place + 2])
        elif word.startswith(f"{_CONFIG}="):
            found = word.removeprefix(f"{_CONFIG}=")
    return found


def _load(path: Path) -> Any:
    import tomllib

    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml", ".json"):
            return _load_yaml(text, path)
    except OSError as error:
        raise ConfigError(f"{_CONFIG} {path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_CONFIG} {path} is not UTF-8 (byte {error.start}); convert it first") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{_CONFIG} {path} is not TOML: {error}; correct the file") from None
    raise ConfigError(f"{_CONFIG} {path} has an unknown suffix; name it .yaml, .yml, .json or .toml")


def _load_yaml(text: str, path: Path) -> Any:
    """YAML, of which JSON is a part; PyYAML itself would take the last of two equal keys."""
    import yaml

    try:
        return yaml.load(text, _unique_keys_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{_CONFIG} {path} is not YAML: {error}; correct the file") from None
    except RecursionError:
        raise ConfigError(f"{_CONFIG} {path} is nested too deeply; flags are at its top level") from None


@functools.cache
def _unique_keys_loader() -> Any:
    import yaml

    class UniqueKeysLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Loads values only, and refuses a key that is there twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
            return super().construct_mapping(node, deep)

    return UniqueKeysLoader


def _for_command(loaded: Any, command: str, name: str) -> dict[str, Any]:
    """The keys for all commands, overridden by those in the command's own table."""
    from phalanx.launch.commands import COMMANDS

    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{_CONFIG} {name} is not a table; write lines like max-num-seqs: 64")
    shared = {_flag(key): value for key, value in loaded.items() if not (key in COMMANDS and isinstance(value, dict))}
    own = loaded.get(command)
    return shared | {_flag(key): value for key, value in (own if isinstance(own, dict) else {}).items()}


def _flag(key: object) -> str:
    return str(key).replace("_", "-")
