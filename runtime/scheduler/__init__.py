# SPDX-License-Identifier: Apache-2.0
"""Decides what each step computes: a pure state machine without device, ranks or clock."""

from phalanx.runtime.scheduler.deltas import DeltaBatch
from phalanx.runtime.scheduler.scheduler import Scheduler
from phalanx.runtime.scheduler.values import SchedulerConfig, SchedulerStats

__all__ = ["DeltaBatch", "Scheduler", "SchedulerConfig", "SchedulerStats"]
