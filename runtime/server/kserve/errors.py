# SPDX-License-Identifier: Apache-2.0
"""Refusals of the v2 protocol."""

from __future__ import annotations

from phalanx.runtime.server.errors import ApiError

__all__ = ["InvalidTensor"]


class InvalidTensor(ApiError):
    """A request whose tensors contradict themselves or their model; the message names tensor, value and limit."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)
