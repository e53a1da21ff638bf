# SPDX-License-Identifier: Apache-2.0
"""Activations that kernels compute, by the names under which ``include/activation.cuh`` has them."""

from __future__ import annotations

from typing import Literal

__all__ = ["ACTIVATIONS", "ActivationName"]

ActivationName = Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu2"]
ACTIVATIONS: tuple[ActivationName, ...] = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2")
