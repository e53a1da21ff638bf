# SPDX-License-Identifier: Apache-2.0
"""Fields of ``quantization_config``, by type: one clear error each, and nothing that is read as something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phalanx.parallel.errors import ConfigError

__all__ = ["Section", "flag", "group_size", "integer", "listed_names", "names", "number", "table"]

Section = Mapping[str, Any]


def integer(section: Section, key: str, default: int, minimum: int = 1) -> int:
    """A whole number, or one that is spelled as text; absent or null means ``default``."""
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _wrong(key, value, f"a whole number of at least {minimum}")
    return value


def group_size(section: Section, key: str = "group_size", default: int = 128) -> int:
    """Columns that share a scale; 0 = the row, which files call -1 or 0."""
    return max(integer(section, key, default, minimum=-1), 0)


def number(section: Section, key: str, default: float) -> float:
    """A finite number above zero; absent or null means ``default``."""
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _wrong(key, value, "a finite number above zero")
    return float(value)


def flag(section: Section, key: str, default: bool) -> bool:
    """True or false; absent or null means ``default``."""
    value = section.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def names(section: Section, key: str) -> tuple[str, ...]:
    """A list of names; absent or null means none."""
    value = section.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise _wrong(key, value, "a list of names")
    return tuple(value)


def listed_names(section: Section, key: str) -> tuple[str, ...]:
    """A list of names, or of lists of them, as one; absent or null means none."""
    value = section.get(key)
    if value is None:
        return ()
    blocks = value if isinstance(value, list | tuple) else [value]
    flat = [name for block in blocks for name in (block if isinstance(block, list | tuple) else [block])]
    if blocks is not value or not all(isinstance(name, str) and name for name in flat):
        raise _wrong(key, value, "a list of names or of lists of names")
    return tuple(flat)


def table(section: Section, key: str) -> Section:
    """An object of fields; absent or null means an empty one."""
    value = section.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "an object of fields")
    return value


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"quantization_config in config.json: {key}={str(value)[:80]} is not {wanted}; restore the file from where the checkpoint "
        "comes from"
    )
