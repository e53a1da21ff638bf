# SPDX-License-Identifier: Apache-2.0
"""Who may use which part of the key/value cache: the planner protocol, paged blocks, one slot for each sequence."""

from phalanx.runtime.kv_cache.blocks import BlockPlanner
from phalanx.runtime.kv_cache.planner import CachePlanner
from phalanx.runtime.kv_cache.slots import SlotPlanner

__all__ = ["BlockPlanner", "CachePlanner", "SlotPlanner"]
