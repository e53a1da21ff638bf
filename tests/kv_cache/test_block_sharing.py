"""Any order of starts, forks, steps and ends: each sequence reads its own tokens back, and no block is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phalanx.runtime.kv_cache import BlockPlanner
from phalanx.runtime.step import BatchState, StepPlan

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_LEN = 12, 4, 4, 24
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=12)  # two tokens, so that prefixes are often equal


@dataclass
class Running:
    """A sequence; ``num_filled`` of its tokens are in the cache, or will be once the next plan's copies are made."""

    token_ids: list[int]
    num_filled: int


class Sharing(RuleBasedStateMachine):
    """A cache made of token ids next to the planner; plans are carried out as executors do it."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = BlockPlanner(NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_LEN)
        self.state = BatchState.empty(MAX_NUM_SEQS, MAX_LEN // BLOCK_SIZE)
        self.contents = np.zeros((NUM_BLOCKS, BLOCK_SIZE), np.int32)
        self.running: dict[int, Running] = {}

    def next_row(self) -> int:
        return next(row for row in range(MAX_NUM_SEQS) if row not in self.running)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.running)))

    def keys(self, sequence: Running) -> list[bytes]:
        """Of the full blocks that are filled."""
        keys: list[bytes] = []
        self.planner.extend_keys(keys, np.array(sequence.token_ids[: sequence.num_filled], np.int32))
        return keys

    @precondition(lambda self: len(self.running) < MAX_NUM_SEQS)
    @rule(prompt=PROMPTS, spare=st.integers(0, 3))
    def start(self, prompt: list[int], spare: int) -> None:
        row, keys = self.next_row(), []
        self.planner.extend_keys(keys, np.array(prompt, np.int32))
        num_cached = self.planner.admit(row, len(prompt), MAX_LEN, keys, spare)
        if num_cached is not None:
            self.running[row] = Running(list(prompt), num_cached)

    @precondition(lambda self: 0 < len(self.running) < MAX_NUM_SEQS)
    @rule(data=st.data(), more=st.lists(st.integers(1, 2), min_size=1, max_size=6), spare=st.integers(0, 3))
    def fork(self, data: st.DataObject, more: list[int], spare: int) -> None:
        row, parent = self.next_row(), self.pick(data)
        num_shared = data.draw(st.integers(0, self.running[parent].num_filled))
        token_ids = (self.running[parent].token_ids[:num_shared] + more)[:MAX_LEN]
        if len(token_ids) > num_shared:
            found = self.planner.fork(row, parent, num_shared, len(token_ids), MAX_LEN, spare)
            assert found in (num_shared, None)
            if found is not None:
                self.running[row] = Running(token_ids, num_shared)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), trusted=st.booleans())
    def end(self, data: st.DataObject, trusted: bool) -> None:
        row = self.pick(data)
        sequence = self.running.pop(row)
        if trusted:
            self.planner.release(row, self.keys(sequence))
        else:
            self.planner.discard(row)

    @precondition(lambda self: self.running)
    @rule(token=st.integers(1, 2))
    def step(self, token: int) -> None:
        """Compute all that is known; sequences without more to compute get another token, if there are blocks."""
        done = [
            row for row, sequence in self.running.items() if sequence.num_filled == len(sequence.token_ids) < MAX_LEN
        ]
        positions = [self.running[row].num_filled for row in done]
        if self.planner.extend(np.array(done, np.intp), np.array(positions, np.int32)):
            for row in done:
                self.running[row].token_ids.append(token)
        ones = np.ones(1, np.int32)
        copies = self.planner.take_copies()
        assert set(copies[:, 1]).isdisjoint(copies[:, 2])
        assert len(set(copies[:, 2])) == len(copies)
        plan = StepPlan.pack(0, ones, ones, ones, ones, ones, new_blocks=self.planner.take_new_blocks(), copies=copies)
        self.state.apply(plan)
        self.contents[copies[:, 2]] = self.contents[copies[:, 1]]
        for row, sequence in self.running.items():
            self.write(row, sequence)
        for row, sequence in self.running.items():
            self.planner.mark_filled(row, self.keys(sequence))

    def write(self, row: int, sequence: Running) -> None:
        positions = np.arange(sequence.num_filled, len(sequence.token_ids))
        blocks = self.state.block_tables[0, row, positions // BLOCK_SIZE]
        for other in self.running.keys() - {row}:
            assert set(blocks.tolist()).isdisjoint(self.planner.block_table(other).tolist()), "a block has one writer"
        self.contents[blocks, positions % BLOCK_SIZE] = np.array(sequence.token_ids)[positions]
        sequence.num_filled = len(sequence.token_ids)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        copies = dict(self.planner._copies)
        for row, sequence in self.running.items():
            table = [copies.get(block, block) for block in self.planner.block_table(row).tolist()]
            read = self.contents[table].ravel()[: sequence.num_filled].tolist()
            assert read == sequence.token_ids[: sequence.num_filled]

    @invariant()
    def blocks_are_held_as_often_as_they_stand_in_tables(self) -> None:
        held = set().union(*(self.planner.block_table(row).tolist() for row in self.running))
        held |= set(self.planner._copies.values())
        assert self.planner.num_free_blocks == NUM_BLOCKS - len(held)

    def teardown(self) -> None:
        for row, sequence in self.running.items():
            self.planner.release(row, self.keys(sequence))
        self.planner.check_idle()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
