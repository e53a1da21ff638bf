# SPDX-License-Identifier: Apache-2.0
"""Not outliving the process that started this one."""

from __future__ import annotations

import ctypes
import signal

__all__ = ["signal_when_parent_dies"]

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send ``number`` to this process when its parent ends, however that happens (Linux, prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
