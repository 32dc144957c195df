"""Both machines against each other over a bad way: nothing leaks, no wrong byte is committed, all ends."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvtransfer.frames import Chunk, Nack
from kvtransfer.sender import MAX_RESENDS
from kvtransfer.session import GivenUp, HostBroke, ReservationDenied, TransferState
from kvtransfer.wire import CHUNK_HEADER_BYTES, decode
from tests.support.kvtransfer_world import LEASE_S, TIMEOUT_S, Side, World

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.sampled_from(["sender", "receiver"])
LEASED = (TransferState.RESERVED, TransferState.RECEIVING, TransferState.VERIFIED)
INDEXES = st.integers(0, 100)


class FaultyTransfer(RuleBasedStateMachine):
    """Anything may happen, in any order. `World.check` runs after every event."""

    @initialize(seed=SEEDS)
    def start(self, seed: int) -> None:
        self.world = World(seed)

    def _side(self, name: str) -> Side:
        return self.world.sender if name == "sender" else self.world.receiver

    @rule()
    def compute(self) -> None:
        self.world.compute()

    @rule(name=SIDES)
    def write(self, name: str) -> None:
        if self._side(name).outbox:
            self.world.write(self._side(name))

    @rule(name=SIDES, index=INDEXES)
    def arrive_in_any_order(self, name: str, index: int) -> None:
        side = self._side(name)
        if side.incoming:
            self.world.arrive(side, index % len(side.incoming))

    @rule(num_steps=st.integers(1, 12))
    def go_well_for_a_while(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.world.step()

    @precondition(lambda self: self.world.reservation is not None)
    @rule()
    def grant(self) -> None:
        self.world.grant()

    @precondition(lambda self: self.world.reservation is not None)
    @rule(retryable=st.booleans())
    def deny(self, retryable: bool) -> None:
        self.world.reservation = None
        self.world.post(self.world.receiver, ReservationDenied("the pool is full", retryable))

    @rule(name=SIDES, index=INDEXES)
    def double(self, name: str, index: int) -> None:
        messages = self._side(name).incoming
        if messages:
            messages.append(messages[index % len(messages)])

    @rule(name=SIDES, index=INDEXES)
    def lose(self, name: str, index: int) -> None:
        messages = self._side(name).incoming
        if messages:
            messages.pop(index % len(messages))

    @rule(name=SIDES, index=INDEXES, bit=st.integers(0, 2000))
    def damage(self, name: str, index: int, bit: int) -> None:
        side = self._side(name)
        if side.incoming:
            self.world.damage(side, index % len(side.incoming), bit)

    @rule(duration_s=st.sampled_from([0.1, LEASE_S / 3, LEASE_S, TIMEOUT_S / 2]))
    def wait(self, duration_s: float) -> None:
        self.world.wait(duration_s)

    @precondition(lambda self: not self.world.is_cut)
    @rule()
    def cut(self) -> None:
        self.world.cut()

    @rule(name=SIDES)
    def give_up(self, name: str) -> None:
        self.world.post(self._side(name), GivenUp("no longer wanted"))

    @rule(name=SIDES)
    def host_breaks(self, name: str) -> None:
        self.world.post(self._side(name), HostBroke("out of range"))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        # Faults stop: what is on its way arrives, and then time passes.
        self.world.run_without_faults()
        self.world.wait(TIMEOUT_S + LEASE_S)
        assert self.world.is_over
        assert not self.world.sender.owned
        assert not self.world.receiver.owned
        assert len(self.world.leases) == 0


TestFaultyTransfer = FaultyTransfer.TestCase
TestFaultyTransfer.settings = settings(max_examples=max(150, settings().max_examples), stateful_step_count=40)


def assert_succeeded(world: World) -> None:
    assert world.sender.machine.state is TransferState.RELEASED
    assert world.receiver.machine.state is TransferState.COMMITTED
    assert world.sender.end is not None
    assert world.sender.end.report is not None


@given(SEEDS)
def test_without_faults_it_commits(seed: int) -> None:
    world = World(seed)
    world.run_without_faults()
    assert_succeeded(world)


@given(SEEDS)
def test_damage_to_payloads_is_repaired_while_it_stays_rare(seed: int) -> None:
    world = World(seed)
    rng = random.Random(seed)
    num_damaged: dict[int, int] = {}
    while world.step():
        for index, message in enumerate(world.receiver.incoming):
            number = int.from_bytes(message[12:16], "little")
            is_chunk = len(message) > CHUNK_HEADER_BYTES and message[4] == 1
            if is_chunk and num_damaged.get(number, 0) < MAX_RESENDS and rng.random() < 0.3:
                num_damaged[number] = num_damaged.get(number, 0) + 1
                payload_bits = (len(message) - CHUNK_HEADER_BYTES) * 8
                world.damage(world.receiver, index, CHUNK_HEADER_BYTES * 8 + rng.randrange(payload_bits))
        world.wait(0.01)
    assert_succeeded(world)


@given(SEEDS)
def test_neither_order_nor_doubles_keep_it_from_committing(seed: int) -> None:
    world = World(seed)
    rng = random.Random(seed)
    nums_before = [0, 0]
    while world.step(pick=rng.randrange):
        for side, num_before in zip(world.sides, nums_before, strict=True):
            # Only what this step has sent: a double of a double of a double would never end.
            for message in side.incoming[num_before:]:
                # A doubled Nack asks for one more of the few repeats, so it may end the transfer.
                if rng.random() < 0.1 and not isinstance(decode(message), Nack):
                    side.incoming.append(message)
        nums_before = [len(side.incoming) for side in world.sides]
        world.wait(0.001)
    assert_succeeded(world)


@given(SEEDS, st.integers(0, 60), st.sampled_from(["sender", "receiver"]))
def test_when_one_side_dies_the_other_is_rid_of_its_blocks_in_time(
    seed: int, num_steps: int, dead: str
) -> None:
    world = World(seed)
    for _ in range(num_steps):
        world.step()
    living = world.receiver if dead == "sender" else world.sender
    # From now on nothing is said, and nobody tells the living side so.
    world.reservation = None
    for side in world.sides:
        side.incoming.clear()
        side.outbox.clear()
    is_leased = living.machine.state in LEASED
    world.wait(LEASE_S if is_leased else TIMEOUT_S)
    assert living.machine.is_ended
    assert not living.owned


def test_a_lost_chunk_is_asked_for_when_finish_comes() -> None:
    world = World(seed=1)
    has_lost = False
    while world.step():
        if not has_lost and any(isinstance(decode(m), Chunk) for m in world.receiver.incoming):
            world.receiver.incoming.pop()
            has_lost = True
    assert has_lost
    assert_succeeded(world)
