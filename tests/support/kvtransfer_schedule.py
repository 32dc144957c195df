"""Random schedules: one seed is one, the same on every machine.

A calm schedule has only what a transfer must survive: delay, doubles, disorder, short cuts, repairable damage; it has
to end in a commit. In the others anything may happen, and nothing may leak, hang, or be accepted that is wrong.
"""

import random
from collections import Counter
from dataclasses import dataclass

from kvtransfer.session import TransferState
from tests.support.kvtransfer_faults import Faults
from tests.support.kvtransfer_forgery import ROWS, Row
from tests.support.kvtransfer_moves import function_of, moves, pick
from tests.support.kvtransfer_sides import Side
from tests.support.kvtransfer_world import World

#: Moments between two moves, in seconds.
TICK_S = 0.001
MAX_ATTEMPTS = 3
#: Faults of calm schedules.
CALM = (
    "pause",
    "double",
    "disorder",
    "cut",
    "timely_cut",
    "fail_to_open",
    "damage",
    "misnumber",
    "bad_copy",
    "misname",
    "slow_reading",
    "early_timer",
)
#: Faults that show more together.
THEMES: tuple[tuple[str, ...], ...] = (
    (),
    (),
    ("cut", "stall"),
    ("timely_cut", "stall"),
    ("cut", "forge"),
    ("cut", "give_up", "host_breaks"),
    ("late_chunk", "late_chunk", "give_up"),
    ("late_chunk", "late_chunk", "late_chunk", "restart_receiver"),
    ("late_chunk", "late_chunk", "late_chunk", "restart_receiver"),
    ("change_source", "change_source", "damage", "damage"),
    ("lose", "damage", "double"),
)
#: Faults that are tried until they happen once.
STICKY = ("misname", "timely_cut", "restart_receiver")
#: Faults that end most transfers, and are held back for a while.
FATAL = ("forge", "give_up", "host_breaks", "misuse", "kill_sender", "silence")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one schedule."""

    seed: int
    is_calm: bool
    #: How each side of each attempt ended: "sender committed", "receiver LeaseExpired", "sender killed".
    ends: tuple[str, ...]
    #: How often each fault happened.
    faults: Counter[str]
    rows: Counter[Row]
    num_events: int


def run_schedule(seed: int) -> Outcome:
    """Raises AssertionError when something does not hold."""
    return Schedule(seed).run()


class Schedule:
    """One world, and what goes wrong in it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.rng = rng
        self.is_calm = rng.random() < 0.35
        # Rows take turns, so that none is left to chance.
        target = ROWS[seed % len(ROWS)] if not self.is_calm and rng.random() < 0.5 else None
        # Only what is fetched has a receiver that waits for the first word.
        self.is_fetch = (
            rng.random() < 0.15 if target is None else target[:2] == ("receiver", TransferState.NEW)
        )
        self.world = World(rng)
        self.faults = Faults(self.world, rng, is_calm=self.is_calm, is_fetch=self.is_fetch, target=target)
        self.counts: Counter[str] = self.faults.counts
        self.num_attempts = 0
        #: How probable it is that what may happen now does not yet.
        self.delays: dict[object, float] = {
            self.world.arrive: rng.choice((0.0, 0.5, 0.9)),
            self.world.compute: rng.choice((0.0, 0.0, 0.9)),
            self.world.notice_break: rng.choice((0.0, 0.8)),
            self.world.write: rng.choice((0.0, 0.0, 0.8)),
            self.world.open: rng.choice((0.0, 0.0, 0.9)),
            self.world.finish_reading: rng.choice((0.0, 0.5, 0.9)),
        }
        if target is not None and target[1] is TransferState.RESERVED:
            self.delays[self.world.compute] = 0.95

    def run(self) -> Outcome:
        """All of it, to the end."""
        rng, world = self.rng, self.world
        names = self._names()
        rate = rng.choice((0.05, 0.2, 0.5))
        self.begin()
        patience = rng.choice((0, 20, 40, 80))
        # An ambush has time to succeed.
        for number in range(400 if self.faults.target is not None else rng.randint(10, 120)):
            for name in STICKY:
                if name in names and not self.counts[name]:
                    self.faults.happen(name)
            if rng.random() < rate:
                name = rng.choice(names)
                if (number >= patience or name not in FATAL) and name not in STICKY:
                    self.faults.happen(name)
            if self.faults.target is not None:
                self.faults.ambush()
            possible = moves(world)
            if possible:
                move = pick(rng, possible)
                if rng.random() > self.delays.get(function_of(move), 0.0):
                    move()
                world.wait(TICK_S)
            elif not world.is_over:
                self._sleep()
            elif not self._retry():
                break
        world.settle()
        if self.is_calm:
            self._check_success()
        return self._outcome()

    def begin(self) -> None:
        """One more attempt."""
        self.num_attempts += 1
        if self.is_fetch:
            self.world.begin_fetch(f"t{self.num_attempts}")
            return
        is_stale = not self.is_calm and self.rng.random() < 0.1
        transfer_id = self.rng.choice(("t1", f"t{self.num_attempts}"))
        self.world.begin(transfer_id, self.world.incarnation - is_stale)

    def _names(self) -> list[str]:
        rng = self.rng
        if self.faults.target is not None:
            # Nothing else is to end it before.
            return [*rng.sample(CALM, rng.randint(1, 3)), "cut", *rng.choice(THEMES)[:1]]
        if not self.is_calm:
            names = rng.sample(self.faults.names, rng.randint(1, 6))
            return names + list(rng.choice(THEMES))
        names = rng.sample(CALM, rng.randint(1, len(CALM)))
        # A chunk that is taken for another must be so alone: a double, or one half of the exchange, is beyond repair.
        return ["misname", "pause"] if "misname" in names else names

    def _sleep(self) -> None:
        """Until something is due."""
        due_s = [min(one.machine.next_deadline_s, one.reconnect_at_s) for one in self.world.live_sides()]
        self.world.wait(max(0.0, min(due_s) - self.world.now_s))

    def _retry(self) -> bool:
        if self.is_calm or self.num_attempts == MAX_ATTEMPTS:
            return False
        self.begin()
        return True

    def _check_success(self) -> None:
        [transfer] = self.world.transfers
        ends = [(side.name, side.machine.state, side.end) for side in transfer.sides]
        assert transfer.has_succeeded, f"{dict(self.counts)} kept a transfer from succeeding: {ends}"
        assert self.world.num_asked_for == 0, f"{dict(self.counts)} lost a chunk on a stream that stands"

    def _outcome(self) -> Outcome:
        ends = tuple(_end_of(side) for side in self.world.all_sides)
        world = self.world
        return Outcome(self.seed, self.is_calm, ends, self.counts, world.rows, world.num_events)


def _end_of(side: Side) -> str:
    if side.is_dead:
        return f"{side.name} killed"
    assert side.end is not None
    return f"{side.name} {type(side.end.error).__name__ if side.end.error else 'committed'}"
