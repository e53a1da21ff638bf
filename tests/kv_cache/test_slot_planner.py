"""Fixed slots: block i belongs to slot i, and the scheduler's calls work as with pages."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.kv_cache import SlotPlanner


def test_slot_holds_its_own_block_and_shares_nothing() -> None:
    planner = SlotPlanner(max_num_seqs=3, max_model_len=16)
    keys: list[bytes] = []
    planner.extend_keys(keys, np.arange(16, dtype=np.int32))
    assert keys == []
    assert planner.admit(2, 5, 16, keys, spare_blocks=0) == 0
    assert planner.admit(0, 5, 16, keys, spare_blocks=3) == 0, "slots need no reserve for growth"
    assert planner.take_new_blocks().tolist() == [[0, 2, 0, 2], [0, 0, 0, 0]]
    assert planner.take_new_blocks().shape == (0, 4)
    assert planner.num_free_blocks == 1
    assert planner.extend(np.array([0, 2]), np.array([15, 15], np.int32))
    planner.release(2, keys)
    planner.discard(0)
    assert planner.num_free_blocks == planner.num_blocks == 3


def test_slots_of_no_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 slots of 16 tokens"):
        SlotPlanner(0, 16)
