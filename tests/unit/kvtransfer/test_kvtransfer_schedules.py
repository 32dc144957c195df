"""Both machines against each other while everything goes wrong: nothing leaks, no wrong byte is committed, all ends.

benchmarks/kvtransfer/schedules.py runs as many seeds as one likes, and says what they met.
"""

import random
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.kvtransfer_faults import Faults
from tests.support.kvtransfer_forgery import ROWS, Row
from tests.support.kvtransfer_moves import moves
from tests.support.kvtransfer_schedule import Schedule, run_schedule
from tests.support.kvtransfer_world import World

NUM_SCHEDULES = 3000
SEEDS = st.integers(0, 2**32 - 1)
FAULTS = Schedule(0).faults.names


def test_many_schedules_hold_and_use_every_row_of_both_tables() -> None:
    rows: Counter[Row] = Counter()
    faults: Counter[str] = Counter()
    num_committed = 0
    for seed in range(NUM_SCHEDULES):
        outcome = run_schedule(seed)
        rows.update(outcome.rows)
        faults.update(outcome.faults)
        num_committed += "receiver committed" in outcome.ends
    assert set(ROWS) <= rows.keys()
    assert all(faults[name] for name in FAULTS), faults
    assert NUM_SCHEDULES / 2 < num_committed < NUM_SCHEDULES


def test_a_schedule_is_the_same_every_time() -> None:
    for seed in range(20):
        assert run_schedule(seed) == run_schedule(seed)


class AnyFaultAtAnyTime(RuleBasedStateMachine):
    """As the schedules, but what happens when is chosen by hypothesis, which makes a failing case small."""

    @initialize(seed=SEEDS)
    def start(self, seed: int) -> None:
        rng = random.Random(seed)
        self.world = World(rng)
        self.faults = Faults(self.world, rng, is_calm=False, is_fetch=False)
        self.world.begin()

    @rule(index=st.integers(0, 100))
    def move(self, index: int) -> None:
        possible = moves(self.world)
        if possible:
            possible[index % len(possible)]()

    @rule(num_moves=st.integers(1, 12))
    def go_well_for_a_while(self, num_moves: int) -> None:
        for _ in range(num_moves):
            for move in moves(self.world)[:1]:
                move()

    @rule(name=st.sampled_from(FAULTS))
    def go_wrong(self, name: str) -> None:
        self.faults.happen(name)

    @rule(duration_s=st.sampled_from([0.01, 0.5, 2.0]))
    def wait(self, duration_s: float) -> None:
        self.world.wait(duration_s)

    @rule()
    def try_again(self) -> None:
        if self.world.is_over and len(self.world.transfers) < 3:
            self.world.begin(f"t{len(self.world.transfers)}")

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestAnyFaultAtAnyTime = AnyFaultAtAnyTime.TestCase
TestAnyFaultAtAnyTime.settings = settings(
    max_examples=max(60, settings().max_examples), stateful_step_count=40
)
