# SPDX-License-Identifier: Apache-2.0
"""What the components of dummy weights in codes are drawn from: values with a standard deviation of about 0.02, as those without a format."""

from __future__ import annotations

from phalanx.checkpoints.spec import DummyRange

__all__ = ["DUMMY_CODES", "DUMMY_INPUT_SCALES", "DUMMY_SCALES"]

DUMMY_CODES = {"int4": DummyRange(-7.99, 7.99), "int8": DummyRange(-127.9, 127.9), "fp8": DummyRange(-448.0, 448.0)}
DUMMY_SCALES = {kind: DummyRange(0.04 / -codes.low, 0.05 / -codes.low) for kind, codes in DUMMY_CODES.items()}
DUMMY_INPUT_SCALES = {kind: DummyRange(8.0 / -codes.low, 8.0 / -codes.low) for kind, codes in DUMMY_CODES.items()}
"""Static scales of inputs, which reach 8."""
