"""Frames of nobody, for either side of a transfer."""

from dataclasses import replace

from kvtransfer.errors import MalformedFrame
from kvtransfer.frames import (
    Abort,
    Ack,
    Commit,
    Ended,
    Finish,
    Frame,
    Granted,
    Nack,
    Refused,
    Renew,
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.receiver import TABLE as RECEIVER_TABLE
from kvtransfer.sender import TABLE as SENDER_TABLE
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    ChunkRead,
    FrameDamaged,
    GivenUp,
    HostBroke,
    KvReady,
    PrefillFinished,
    TimePassed,
    TransferState,
)
from tests.support.kvtransfer_shape import LEASE_S, TOKEN_IDS
from tests.support.kvtransfer_sides import Side
from tests.support.kvtransfer_world import World

#: (side, state, event)
Row = tuple[str, TransferState, str]

#: Of both tables, in the same order everywhere.
ROWS: tuple[Row, ...] = tuple(
    sorted(
        (name, state, event.__name__)
        for name, table in (("sender", SENDER_TABLE), ("receiver", RECEIVER_TABLE))
        for state, event in table
    )
)


def hears_others(side: Side) -> bool:
    """Before a stream stands, and by streams that are for chunks alone."""
    state = side.machine.state
    return state is TransferState.NEW or (side.name == "receiver" and state is TransferState.SUSPENDED)


def forged(world: World, side: Side) -> list[Frame | FrameDamaged]:
    """Anything but what would say that it is done."""
    number = world.rng.choice((0, 1, 2, 3, 2**32 - 1))
    damaged = FrameDamaged(MalformedFrame("nonsense", 3), world.rng.choice((None, number)))
    if isinstance(side.machine, SenderMachine):
        frames = [Ended("no"), Refused("full", retryable=True), Ack(number), Nack(number, "forged")]
        frames += [Verified(), Resumed(number), _forged_grant(world)]
        return [*frames, damaged]
    machine = side.machine
    lease_id = machine.lease_id or 0
    fresh = Resume(side.transfer.transfer_id, 0, lease_id, side.incarnation)
    frames = [Abort("no"), Finish(number, b""), Renew(), fresh, replace(fresh, lease_id=lease_id + 1)]
    if machine.state is TransferState.SUSPENDED:
        frames = [Abort("no"), Finish(number, b""), damaged]
    if machine.state is TransferState.NEW:
        frames.append(Refused("nobody listens", retryable=True))
    if machine.request is not None:
        frames.append(machine.request)
    if machine.lease_id is None or machine.state is TransferState.SUSPENDED:
        frames.append(Commit((1,)))
    return [*frames, damaged]


def _forged_grant(world: World) -> Granted:
    grant = Granted(99, world.incarnation, 1, LEASE_S, world.shape.transport, "", (0, 2))
    other = world.rng.choice(({}, {"incarnation": 0}, {"transport": "nixl"}, {"heads": (1, 3)}))
    return replace(grant, **other)


def misuses(side: Side) -> list[KvReady | PrefillFinished]:
    """What a prefill loop with a bug may say."""
    transfer = side.transfer
    beyond = KvReady(KvRange(0, side.pool.layout.num_layers + 1, 0, transfer.num_tokens))
    is_wrong_to_finish = bool(transfer.to_compute) or transfer.is_prefill_finished
    return [beyond, PrefillFinished((1,))] if is_wrong_to_finish else [beyond]


def unasked(world: World, side: Side) -> list[object]:
    """All that may come to a side without being an answer to what it did."""
    events: list[object] = [*forged(world, side), GivenUp("no"), HostBroke("out of range"), TimePassed()]
    if isinstance(side.machine, SenderMachine):
        events += misuses(side)
        if side.machine.state is TransferState.VERIFIED:
            # It was to be sent once more.
            events.append(ChunkRead(0, 0, 1))
    elif side.machine.lease_id is not None and side.machine.state is not TransferState.SUSPENDED:
        # It has overtaken all else.
        events.append(Commit(() if side.transfer.is_fetch else TOKEN_IDS))
    return events
