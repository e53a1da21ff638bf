# SPDX-License-Identifier: Apache-2.0
"""Model definitions: plain functions over Ops and the declaration of their weights."""

from __future__ import annotations

from phalanx.runtime.models.base import Model
from phalanx.runtime.models.registry import MODELS, find_model

__all__ = ["MODELS", "Model", "find_model"]
