# SPDX-License-Identifier: Apache-2.0
"""One step: the plan that rank 0 broadcasts, the batch state that it changes, the result, and how long steps take."""

from __future__ import annotations

from phalanx.runtime.step.history import TokenHistory
from phalanx.runtime.step.layout import ADMISSION, PENDING_TOKEN, STEP_LAYOUT, TOKEN_BIAS, TOKEN_BIAS_ENTRY, RowKind
from phalanx.runtime.step.limits import StepLimits
from phalanx.runtime.step.plan import StepPlan
from phalanx.runtime.step.result import StepResult
from phalanx.runtime.step.state import BatchState

__all__ = [
    "ADMISSION",
    "PENDING_TOKEN",
    "STEP_LAYOUT",
    "TOKEN_BIAS",
    "TOKEN_BIAS_ENTRY",
    "BatchState",
    "RowKind",
    "StepLimits",
    "StepPlan",
    "StepResult",
    "TokenHistory",
]
