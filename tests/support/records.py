"""Admission records for tests that make plans by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.sampling.fields import SamplingParams, device_values
from phalanx.runtime.step import ADMISSION

__all__ = ["admission"]


def admission(params: SamplingParams | None = None, vocab_size: int = 1 << 20, **columns: Any) -> NDArray[np.void]:
    """``[1]`` record of ``params`` (greedy, if None), with other ``columns`` as given and the rest 0."""
    values = device_values(params or SamplingParams(temperature=0.0), vocab_size)
    record = np.zeros(1, ADMISSION)
    assert ADMISSION.names is not None
    for name, value in zip(ADMISSION.names[1:], values, strict=False):
        record[name] = value
    for name, value in columns.items():
        record[name] = value
    return record
