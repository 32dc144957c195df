"""What `server.KvTransferServer` does with a new stream, in a `World`."""

from typing import TYPE_CHECKING

from kvtransfer.errors import CorruptFrame, PhasewiseTransferError
from kvtransfer.frames import Abort, Committed, Ended, Fetch, Frame, Refused, Reserve, Resume
from kvtransfer.layout import blocks_needed
from kvtransfer.lease import LeaseTable
from kvtransfer.pool import PoolOffer
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import SenderMachine
from kvtransfer.session import Started
from kvtransfer.wire import decode, encode
from tests.support.kvtransfer_shape import LEASE_S, NUM_MORE_TOKENS, RESUME_S, TIMEOUT_S
from tests.support.kvtransfer_sides import Side, Stream, Transfer

if TYPE_CHECKING:
    from tests.support.kvtransfer_world import World


def accept(world: "World", transfer: Transfer, stream: Stream, name: str) -> None:
    """The first message of a stream says what it is for."""
    stream.is_accepted = True
    stream.heard_by.add(name)
    message = stream.to(name).pop(0)
    try:
        first: Frame = decode(message)
    except CorruptFrame:
        # Whoever it was says it again.
        stream.left_by.add(name)
        return
    except PhasewiseTransferError as error:
        first = Ended(str(error))
    match first:
        case Fetch():
            _serve_fetch(world, transfer, stream, first)
        case Reserve() if _begin_again(world, first, stream):
            pass
        case Reserve() if first.transfer_id in world.sessions:
            _say(world, stream, name, Refused("this transfer is served here already", retryable=False))
        case Reserve():
            side = new_receiver(world, transfer, world.leases, resume_s=RESUME_S)
            side.stream = stream
            world.sessions[first.transfer_id] = side
            world.post(side, first)
        case Resume():
            _resume(world, first, stream)
        case Ended():
            _say(world, stream, name, first)
        case _:
            _say(world, stream, name, Ended(f"a stream does not begin with {type(first).__name__}"))


def _begin_again(world: "World", first: Reserve, stream: Stream) -> bool:
    side = world.sessions.get(first.transfer_id)
    if side is None or not _is_asked_again(side, first):
        return False
    if side.stream is not None:
        world.notice_break(side)
    if side.machine.is_ended or not _is_asked_again(side, first):
        return False
    side.stream = stream
    world.post(side, first)
    return True


def _is_asked_again(side: Side, request: Reserve) -> bool:
    machine = side.machine
    return isinstance(machine, ReceiverMachine) and machine.request == request and machine.is_unanswered


def _resume(world: "World", first: Resume, stream: Stream) -> None:
    side = world.sessions.get(first.transfer_id)
    if side is not None and side.stream is not None:
        # It has not noticed yet that its stream broke.
        world.notice_break(side)
    if side is None or side.machine.is_ended:
        is_settled = first.incarnation == world.incarnation and world.leases.is_settled(first.lease_id)
        _say(world, stream, "receiver", Committed() if is_settled else Ended("not known here any more"))
        return
    side.stream = stream
    world.post(side, first)


def _serve_fetch(world: "World", transfer: Transfer, stream: Stream, fetch: Fetch) -> None:
    if world.is_reserving_refused:
        _say(world, stream, "sender", Abort("nothing is cached here"))
        return
    request = request_of(world, transfer, fetch.incarnation)
    side = transfer.sender = new_sender(world, transfer, request, resume_s=0.0)
    side.stream = stream
    world.post(side, Started())
    while transfer.to_compute or not transfer.is_prefill_finished:
        world.compute(transfer)


def _say(world: "World", stream: Stream, name: str, frame: Frame) -> None:
    if not world.is_silent and not stream.left_by:
        stream.to("sender" if name == "receiver" else "receiver").append(encode(frame))
    stream.left_by.add(name)


def request_of(world: "World", transfer: Transfer, incarnation: int) -> Reserve:
    """What the sender asks for."""
    return Reserve(
        transfer.transfer_id,
        world.shape.sender_layout,
        transfer.num_tokens,
        transfer.num_tokens + NUM_MORE_TOKENS,
        incarnation,
        TIMEOUT_S,
        token_digest=transfer.token_digest,
        offers=(PoolOffer("shm", b"here"),) if world.shape.transport == "shm" else (),
        codec=world.shape.codec,
        num_parts=1 if transfer.is_fetch else world.shape.num_parts,
    )


def new_sender(world: "World", transfer: Transfer, request: Reserve, resume_s: float) -> Side:
    """A sender with its blocks."""
    layout = world.shape.sender_layout
    num_blocks = blocks_needed(transfer.num_tokens, layout.block_size)
    blocks = world.sender_pool.take(transfer, num_blocks)
    machine = SenderMachine(
        request,
        blocks,
        max_chunk_bytes=world.shape.max_chunk_bytes,
        resume_s=resume_s,
        now_s=world.now_s,
    )
    side = Side(
        "sender",
        machine,
        transfer,
        world.sender_pool,
        LEASE_S,
        resume_s,
        world.now_s + TIMEOUT_S,
        blocks=blocks,
    )
    world.all_sides.append(side)
    return side


def new_receiver(world: "World", transfer: Transfer, leases: LeaseTable, resume_s: float) -> Side:
    """A receiver that has heard nothing yet."""
    machine = ReceiverMachine(
        world.shape.receiver_layout,
        world.incarnation,
        leases,
        lease_s=LEASE_S,
        resume_s=resume_s,
        max_in_flight=world.shape.credits,
        now_s=world.now_s,
    )
    deadline_s = world.now_s + LEASE_S
    side = Side("receiver", machine, transfer, world.receiver_pool, LEASE_S, resume_s, deadline_s)
    side.incarnation = world.incarnation
    transfer.receiver = side
    world.all_sides.append(side)
    return side
