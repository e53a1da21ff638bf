"""One step: the plan that rank 0 broadcasts, the batch state that it changes, the result, and how long steps take."""

from __future__ import annotations

from phalanx.runtime.step.plan import ADMISSION, PENDING_TOKEN, BatchState, StepPlan, StepResult

__all__ = ["ADMISSION", "PENDING_TOKEN", "BatchState", "StepPlan", "StepResult"]
