# SPDX-License-Identifier: Apache-2.0
"""Values in JSON files of a checkpoint: how messages show them, and token ids that every array of a step can hold."""

from __future__ import annotations

import math
from typing import Any

from phalanx.parallel.errors import ConfigError

__all__ = ["MAX_END_TOKENS", "is_finite_number", "optional_token_id", "shown", "token_ids"]

LARGEST_TOKEN_ID = 2**31 - 1
MAX_END_TOKENS = 64
"""Maximum number of end tokens of a model; what a step carries for each sequence."""


def shown(value: Any, length: int = 80) -> str:
    """Return the beginning of ``value`` as Python writes it, for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def is_finite_number(value: Any) -> bool:
    """Whether ``value`` is a Python number that a float can hold: JSON's whole numbers have no largest one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def optional_token_id(name: str, value: Any, file: str) -> int | None:
    """One token id, or None where ``value`` is null.

    Raises:
        ConfigError: anything else than a whole number from 0 to 2**31 - 1.
    """
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return _token_id(name, value, value, file)


def token_ids(name: str, value: Any, file: str) -> tuple[int, ...]:
    """One token id, a list of them, or null, as a tuple without repetitions.

    Raises:
        ConfigError: an element is not a token id, or there are more than `MAX_END_TOKENS`.
    """
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    ids = tuple(dict.fromkeys(_token_id(name, each, value, file) for each in listed))
    if len(ids) > MAX_END_TOKENS:
        raise ConfigError(f"{name} in {file} lists {len(ids)} tokens; at most {MAX_END_TOKENS} are supported")
    return ids


def _token_id(name: str, value: Any, whole: Any, file: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_TOKEN_ID:
        raise ConfigError(
            f"{name}={shown(whole)} in {file} is not a token id or a list of them (whole numbers from 0 to "
            f"{LARGEST_TOKEN_ID}); correct it or remove the key"
        )
    return value
