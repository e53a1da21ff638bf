# SPDX-License-Identifier: Apache-2.0
"""Parameters of a request and of its tensors that change what is answered (https://github.com/triton-inference-server/server, docs/protocol)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.runtime.server.kserve.errors import InvalidTensor

__all__ = ["check_tensor_parameters", "timeout_seconds"]

_REFUSED = ("shared_memory_region", "classification")
_MAX_TIMEOUT = 1 << 63


def timeout_seconds(parameters: Mapping[str, Any]) -> float | None:
    """Return how long a request may take: its ``timeout`` in microseconds; None = it has none, or 0.

    Raises:
        InvalidTensor: it is not such a number.
    """
    given = parameters.get("timeout")
    if given is None:
        return None
    if type(given) is not int or not 0 <= given < _MAX_TIMEOUT:
        raise InvalidTensor(
            f"parameter timeout={given!r:.60} is not a number of microseconds; use 1 or more, or leave it out"
        )
    return given / 1e6 or None


def check_tensor_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Raise InvalidTensor if the tensor is to lie elsewhere or to be ranked: the client would not find what it waits for."""
    for refused in _REFUSED:
        if parameters.get(refused):
            raise InvalidTensor(f"{refused} of tensor '{name:.100}' is not supported by this server; leave it out")
