# SPDX-License-Identifier: Apache-2.0
"""Whether the fields of a `Family` that a model file made are what they are declared to be; Python does not look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models.base import Family, Pass

__all__ = ["check_family", "naming"]

_NO_TENSOR = "a name that no tensor has"


def check_family(model: Family[Any]) -> None:
    """Check the fields that are data, and that the others can be called.

    Raises:
        ConfigError: naming the field, its value and what it should be.
    """
    for name in ("architecture", "model_type"):
        _require(isinstance(getattr(model, name), str), model, name, "a string")
    for name in ("other_names", "ignored_tensors", "told_by"):
        texts = getattr(model, name)
        _require(
            isinstance(texts, tuple) and all(isinstance(text, str) for text in texts), model, name, "a tuple of strings"
        )
    _require(callable(model.read_fields), model, "read_fields", "a function")
    passes: object = model.passes
    kinds = {name: type(each) for name, each in passes.items()} if isinstance(passes, Mapping) else type(passes)
    if not isinstance(kinds, dict) or "decode" not in kinds or set(kinds.values()) != {Pass}:
        raise ConfigError(f"passes holds {kinds}, but it is a mapping to Pass, with one called 'decode'")
    for pattern in model.ignored_tensors:
        _check_pattern(pattern)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say where a mistake is, and take whatever a function raises for one."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


def _require(is_right: bool, model: Family[Any], name: str, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"{name}={getattr(model, name)!r} is not {wanted}")


def _check_pattern(pattern: str) -> None:
    try:
        matches_all = re.fullmatch(pattern, _NO_TENSOR) is not None
    except re.error as error:
        raise ConfigError(f"{pattern!r} in ignored_tensors is no regular expression: {error}") from None
    if matches_all:
        raise ConfigError(
            f"{pattern!r} in ignored_tensors matches every tensor, also those that are missed; name what is ignored"
        )
