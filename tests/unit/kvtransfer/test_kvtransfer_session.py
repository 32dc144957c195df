"""Both machines over a way with one fault at a time: what is survived, and what the end is otherwise."""

import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import DigestMismatch, InvalidTransfer, TransferEnded, TransferRefused
from kvtransfer.frames import Chunk, Nack
from kvtransfer.sender import MAX_RESENDS
from kvtransfer.session import GivenUp, TransferState
from kvtransfer.wire import CHUNK_HEADER_BYTES, decode
from tests.support.kvtransfer_copies import event_of
from tests.support.kvtransfer_faults import Faults
from tests.support.kvtransfer_moves import Move, function_of, moves
from tests.support.kvtransfer_shape import LEASE_S, RESUME_S, TIMEOUT_S, Shape
from tests.support.kvtransfer_sides import Side, Transfer
from tests.support.kvtransfer_world import World

SEEDS = st.integers(0, 2**32 - 1)
LEASED = (TransferState.RESERVED, TransferState.RECEIVING, TransferState.VERIFIED)


def new_world(seed: int, **changes: object) -> tuple[World, Transfer]:
    """changes: of the shape that the seed draws."""
    rng = random.Random(seed)
    world = World(rng, replace(Shape.draw(rng), **changes))  # type: ignore[arg-type]
    return world, world.begin()


def step(world: World) -> bool:
    """The first thing that can happen does; False when there is none."""
    for move in moves(world)[:1]:
        move()
        return True
    return False


def sender_of(transfer: Transfer) -> Side:
    assert transfer.sender is not None
    return transfer.sender


def receiver_of(transfer: Transfer) -> Side:
    assert transfer.receiver is not None
    return transfer.receiver


def incoming(transfer: Transfer) -> list[bytes]:
    """What is on its way to the receiver."""
    stream = sender_of(transfer).stream
    return stream.to_receiver if stream is not None else []


def run_until(world: World, transfer: Transfer, sender: TransferState, receiver: TransferState) -> None:
    for _ in range(500):
        if transfer.receiver is not None and (
            sender_of(transfer).machine.state is sender and transfer.receiver.machine.state is receiver
        ):
            return
        assert step(world), "it is over before"
    raise AssertionError("this state is never reached")


def cut(transfer: Transfer) -> None:
    """The stream breaks with all that is on its way."""
    stream = sender_of(transfer).stream
    assert stream is not None
    stream.to_sender.clear()
    stream.to_receiver.clear()
    stream.left_by |= {"sender", "receiver"}


@given(SEEDS)
def test_without_faults_it_commits(seed: int) -> None:
    world, transfer = new_world(seed)
    world.settle()
    assert transfer.has_succeeded


@given(SEEDS)
def test_what_is_fetched_is_committed_with_no_token(seed: int) -> None:
    world = World(random.Random(seed))
    transfer = world.begin_fetch()
    world.settle()
    assert transfer.has_succeeded
    assert transfer.committed is not None
    assert transfer.committed.token_ids == ()


@given(SEEDS)
def test_damage_to_payloads_is_repaired_while_it_stays_rare(seed: int) -> None:
    world, transfer = new_world(seed, transport="grpc")
    rng = random.Random(seed)
    num_damaged: dict[int, int] = {}
    while step(world):
        messages = incoming(transfer)
        for index, message in enumerate(messages):
            chunk = event_of(message)
            if not isinstance(chunk, Chunk):
                continue
            number = chunk.sequence_number
            if num_damaged.get(number, 0) < MAX_RESENDS and rng.random() < 0.3:
                num_damaged[number] = num_damaged.get(number, 0) + 1
                flipped = bytearray(message)
                flipped[rng.randrange(CHUNK_HEADER_BYTES, len(message))] ^= 1 << rng.randrange(8)
                messages[index] = bytes(flipped)
        world.wait(0.01)
    assert transfer.has_succeeded


@given(SEEDS, st.sampled_from(["grpc", "shm"]))
def test_a_copy_that_goes_wrong_is_made_again(seed: int, transport: str) -> None:
    world, transfer = new_world(seed, transport=transport, codec=CodecId.NONE)
    num_bad = 0
    while step(world):
        if (
            any(isinstance(decode(message), Chunk) for message in incoming(transfer))
            and num_bad < MAX_RESENDS
        ):
            world.num_bad_copies, num_bad = 1, num_bad + 1
        world.wait(0.01)
    assert num_bad > 0
    assert transfer.has_succeeded


@given(SEEDS)
def test_neither_order_nor_doubles_keep_it_from_committing(seed: int) -> None:
    world, transfer = new_world(seed)
    rng = random.Random(seed)
    faults = Faults(world, rng, is_calm=True, is_fetch=False)
    while step(world):
        if rng.random() < 0.1:
            faults.double()
        while rng.random() < 0.3:
            faults.disorder()
        world.wait(0.001)
    assert transfer.has_succeeded


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (TransferState.RESERVED, TransferState.RESERVED),
        (TransferState.RECEIVING, TransferState.RECEIVING),
        (TransferState.RECEIVING, TransferState.VERIFIED),
        (TransferState.VERIFIED, TransferState.COMMITTED),
    ],
)
@given(seed=SEEDS)
def test_a_transfer_whose_stream_breaks_goes_on_over_another(
    sender: TransferState, receiver: TransferState, seed: int
) -> None:
    world, transfer = new_world(seed)
    run_until(world, transfer, sender, receiver)
    cut(transfer)
    world.num_failing_opens = 2
    for _ in range(100):
        step(world)
        world.wait(0.01)
    world.settle()
    assert transfer.has_succeeded
    end = sender_of(transfer).end
    assert end is not None
    assert end.report is not None
    assert end.report.num_resumes == (receiver is not TransferState.COMMITTED)


@given(SEEDS)
def test_after_a_break_nothing_is_sent_twice(seed: int) -> None:
    world, transfer = new_world(seed)
    run_until(world, transfer, TransferState.RECEIVING, TransferState.RECEIVING)
    written = receiver_of(transfer).machine.num_bytes_written  # type: ignore[union-attr]
    cut(transfer)
    world.settle()
    assert transfer.has_succeeded
    total = receiver_of(transfer).machine.num_bytes_written  # type: ignore[union-attr]
    layout = world.shape.receiver_layout
    assert total == layout.num_layers * transfer.num_tokens * layout.token_bytes
    assert written <= total


@given(SEEDS)
def test_a_stream_that_cannot_be_opened_again_ends_both_sides_in_time(seed: int) -> None:
    world, transfer = new_world(seed)
    run_until(world, transfer, TransferState.RECEIVING, TransferState.RECEIVING)
    cut(transfer)
    world.num_failing_opens = 10**6
    while step(world):
        pass
    began_s = world.now_s
    while not transfer.is_over:
        world.wait(0.1)
        while step(world):
            pass
    assert world.now_s - began_s <= RESUME_S + 0.2
    world.check_over()


@given(SEEDS, st.integers(0, 60), st.sampled_from(["sender", "receiver"]))
def test_when_one_side_dies_the_other_is_rid_of_its_blocks_in_time(
    seed: int, num_steps: int, dead: str
) -> None:
    world, transfer = new_world(seed)
    for _ in range(num_steps):
        step(world)
    # From now on nothing is said, and nobody tells the living side so.
    world.is_silent = True
    for side in transfer.sides:
        side.reservation = None
        side.is_dead = side.name == dead
        if side.stream is not None:
            side.stream.to_sender.clear()
            side.stream.to_receiver.clear()
    for side in transfer.sides:
        if not side.is_dead:
            is_leased = side.machine.state in LEASED
            world.wait(LEASE_S if is_leased else TIMEOUT_S)
            assert side.machine.is_ended
            assert not side.blocks


def test_a_lost_chunk_is_asked_for_when_finish_has_come() -> None:
    world, transfer = new_world(1, transport="grpc")
    has_lost = False
    while moves(world) or not transfer.is_over:
        if not step(world):
            world.wait(0.1)
        if not has_lost and any(isinstance(decode(message), Chunk) for message in incoming(transfer)):
            incoming(transfer).pop()
            has_lost = True
    assert has_lost
    assert world.num_asked_for == 1
    assert transfer.has_succeeded


def two_chunks(codec: CodecId = CodecId.NONE) -> tuple[World, Transfer]:
    """A transfer with chunks that can be taken for each other, when both are in the sender's queue."""
    for seed in range(200):
        world, transfer = new_world(seed, transport="grpc", codec=codec, credits=3)
        faults = Faults(world, random.Random(seed), is_calm=True, is_fetch=False)
        while moves(world):
            if faults.misname():
                return world, transfer
            step(world)
    raise AssertionError("no such transfer")


def test_chunks_under_wrong_names_are_sent_once_more() -> None:
    world, transfer = two_chunks()
    world.settle()
    assert transfer.has_succeeded
    assert receiver_of(transfer).machine.num_digest_mismatches == 1  # type: ignore[union-attr]


def test_chunks_that_are_under_wrong_names_time_after_time_are_never_committed() -> None:
    world, transfer = two_chunks()
    names = dict(transfer.misnamed)
    while moves(world):
        transfer.misnamed.update(names)
        step(world)
    end = receiver_of(transfer).end
    assert end is not None
    assert isinstance(end.error, DigestMismatch)
    assert transfer.committed is None


def test_kv_that_changes_after_it_was_sent_is_not_sent_again() -> None:
    world, transfer = new_world(3, transport="grpc", codec=CodecId.NONE)
    while not transfer.ranges_read:
        step(world)
    Faults(world, random.Random(1), is_calm=False, is_fetch=False).change_source()
    stream = sender_of(transfer).stream
    assert stream is not None
    sender = sender_of(transfer)
    world.post(sender, Nack(0, "damaged"))
    world.settle()
    assert sender.end is not None
    assert isinstance(sender.end.error, InvalidTransfer)


def test_a_receiver_that_was_restarted_knows_nothing_of_earlier_leases() -> None:
    world, transfer = new_world(4)
    run_until(world, transfer, TransferState.RECEIVING, TransferState.RECEIVING)
    restart = Faults(world, random.Random(1), is_calm=False, is_fetch=False).restart_receiver
    while not restart():
        pass
    world.settle()
    end = sender_of(transfer).end
    assert end is not None
    assert isinstance(end.error, TransferEnded)
    assert transfer.committed is None


def test_a_request_to_an_earlier_process_is_refused() -> None:
    world = World(random.Random(5))
    transfer = world.begin(incarnation=world.incarnation - 1)
    world.settle()
    end = sender_of(transfer).end
    assert end is not None
    assert isinstance(end.error, TransferRefused)


def test_a_transfer_that_was_given_up_leaves_room_for_the_next() -> None:
    world, first = new_world(6)
    run_until(world, first, TransferState.RECEIVING, TransferState.RECEIVING)
    world.post(sender_of(first), GivenUp("the client left"))
    world.settle()
    second = world.begin("t1")
    world.settle()
    assert second.has_succeeded


@pytest.mark.parametrize("chunk_s", [0.5, 2.0, 4.0])
def test_a_slow_link_on_which_finish_overtakes_the_chunks_sends_nothing_twice(chunk_s: float) -> None:
    layout = Shape.draw(random.Random(0)).sender_layout
    world, transfer = new_world(
        0, num_tokens=4, credits=3, transport="grpc", max_chunk_bytes=layout.token_bytes
    )
    sender = sender_of(transfer)

    def due() -> list[Move]:
        """All but the arrival of a chunk."""
        chunk_is_next = bool(incoming(transfer)) and isinstance(decode(incoming(transfer)[0]), Chunk)
        arrives = [world.arrive] if chunk_is_next else []
        return [
            one
            for one in moves(world)
            if not (function_of(one) in arrives and isinstance(one, partial) and one.args[0] is not sender)
        ]

    while not world.is_over:
        while possible := due():
            possible[0]()
        # What is not a chunk goes by another stream, and is faster.
        others = [i for i, message in enumerate(incoming(transfer)) if not isinstance(decode(message), Chunk)]
        if others:
            world.arrive(receiver_of(transfer), others[0])
        elif incoming(transfer):
            world.wait(chunk_s)
            world.arrive(receiver_of(transfer), 0)
    assert transfer.has_succeeded
    assert world.num_asked_for == 0
    assert sender.end is not None
    assert sender.end.report is not None
    assert sender.end.report.num_resent_chunks == 0
