"""What can happen in a `World` without a fault."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvtransfer.session import TransferState
from tests.support.kvtransfer_serving import accept
from tests.support.kvtransfer_sides import Side

if TYPE_CHECKING:
    from tests.support.kvtransfer_world import World

Move = Callable[[], None]


def moves(world: "World") -> list[Move]:
    """Each thing that can happen now."""
    moves: list[Move] = []
    for transfer in world.transfers:
        for side in transfer.sides:
            if not side.is_dead:
                _moves_of(world, side, moves)
        opener = transfer.receiver if transfer.is_fetch else transfer.sender
        stream = opener.stream if opener is not None else None
        if stream is not None and not stream.is_accepted:
            other = "sender" if transfer.is_fetch else "receiver"
            if stream.to(other):
                moves.append(partial(accept, world, transfer, stream, other))
            elif opener is not None and opener.name in stream.left_by:
                stream.is_accepted = True
                stream.left_by.add(other)
        if transfer.strays and transfer.receiver is not None:
            moves.append(partial(world.stray_arrives, transfer))
        if transfer.sender is not None and not transfer.is_prefill_finished:
            moves.append(partial(world.compute, transfer))
    return moves


def _moves_of(world: "World", side: Side, moves: list[Move]) -> None:
    if side.name == "sender":
        _moves_of_sender(world, side, moves)
    elif side.awaits_parts:
        moves.append(partial(world.parts_whole, side))
    if side.reservation is not None:
        moves.append(partial(world.grant, side))
    stream = side.stream
    if stream is None:
        return
    if side.outbox and side.reading is None:
        moves.append(partial(world.write, side))
    incoming = stream.to(side.name)
    if incoming:
        moves.append(partial(world.arrive, side, 0))
    elif stream.left_by - {side.name} or (side.name in stream.left_by and not side.machine.is_ended):
        moves.append(partial(world.notice_break, side))


def _moves_of_sender(world: "World", side: Side, moves: list[Move]) -> None:
    state = side.machine.state
    if state is TransferState.NEW and side.stream is None:
        moves.append(partial(world.open, side))
    if state is TransferState.SUSPENDED and side.stream is None and world.now_s >= side.reconnect_at_s:
        moves.append(partial(world.open, side))
    if side.reading is not None:
        moves.append(partial(world.finish_reading, side))


def pick(rng: random.Random, options: Sequence[Move]) -> Move:
    """One of them."""
    return options[int(rng.random() * len(options))]


def function_of(move: Move) -> object:
    """The method of the world that a move calls."""
    return move.func if isinstance(move, partial) else move
