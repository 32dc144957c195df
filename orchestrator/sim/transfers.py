"""The transfers of one simulated worker: the machines of kvtransfer over the simulated network. Pure.

KV has no bytes here: a chunk is what the protocol says of it, and takes the time of its bytes on the way. All else is as in
service: leases, credits, verification, commits and what ends them.
"""

import math
from collections.abc import Callable
from typing import assert_never

from kvtransfer.config import KvTransferConfig
from kvtransfer.frames import Chunk, Committed, Ended, Frame, Refused, Reserve, Resume
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.lease import LeaseTable
from kvtransfer.pool import PoolOffer, span_of
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    ChunkDamaged,
    ChunkRead,
    ChunkWritten,
    CommitBlocks,
    End,
    GivenUp,
    KvReady,
    Machine,
    PrefillFinished,
    Reconnect,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    TimePassed,
    WriteChunk,
)
from orchestrator.sim.network import SimNetwork, Stream
from orchestrator.sim.timers import SimTimer, SimTimers
from workers.engine import messages

#: What simulated pools are read by: the receiver copies, and no bytes have to be made.
WAY = "cuda_ipc"
#: Of a frame without a payload.
FRAME_BYTES = 256


class SimTransfers:
    """All that one incarnation of a worker sends and receives.

    post: hands a message to its engine. peer: the transfers of the worker that listens at an address; None when nobody does.
    """

    def __init__(
        self,
        address: str,
        incarnation: int,
        layout: KvLayout,
        config: KvTransferConfig,
        timers: SimTimers,
        network: SimNetwork,
        post: Callable[[messages.Message], None],
        peer: Callable[[str], "SimTransfers | None"],
    ) -> None:
        self.address = address
        self.leases = LeaseTable()
        self._incarnation = incarnation
        self._layout = layout
        self._config = config
        self._timers = timers
        self._network = network
        self._post = post
        self._peer = peer
        self._sending: dict[str, _Side] = {}
        self._receiving: dict[str, _Side] = {}
        self._is_dead = False
        self._paused_until_s = 0.0

    # The engine.

    def handle(self, output: messages.Output) -> bool:
        """Do what the engine says to a transfer; False when it says something else."""
        match output:
            case messages.StartTransfer():
                self._start(output)
            case messages.KvReady():
                kv_range = KvRange(output.layer_lo, output.layer_hi, output.token_lo, output.token_hi)
                self._tell(self._sending, output.transfer_id, KvReady(kv_range))
            case messages.FinishTransfer():
                self._tell(self._sending, output.transfer_id, PrefillFinished(output.token_ids))
            case messages.EndTransfer():
                self._tell(self._sending, output.transfer_id, GivenUp(output.reason))
                self._tell(self._receiving, output.transfer_id, GivenUp(output.reason))
            case messages.BlocksReserved():
                if output.transfer_id in self._receiving:
                    event = BlocksReserved(output.block_ids, WAY)
                    self._tell(self._receiving, output.transfer_id, event)
                else:
                    reason = "nobody waits for these blocks any more"
                    self._post(messages.ReleaseTransfer(output.transfer_id, output.block_ids, reason))
            case messages.ReservationRefused():
                denied = ReservationDenied(output.reason, output.is_retryable)
                self._tell(self._receiving, output.transfer_id, denied)
            case messages.FetchPrefix():
                # Nobody has it: prefixes of other workers are not simulated.
                self._post(messages.PrefixFetched(output.transfer_id, 0))
            case _:
                return False
        return True

    def _start(self, start: messages.StartTransfer) -> None:
        request = Reserve(
            start.transfer_id,
            self._layout,
            start.num_tokens,
            start.max_tokens,
            start.decode_incarnation,
            start.timeout_s,
            start.token_digest,
            offers=(PoolOffer(WAY, b""),),
        )
        machine = SenderMachine(
            request,
            start.block_ids,
            max_chunk_bytes=self._config.max_chunk_bytes,
            resume_s=self._config.resume_s,
            now_s=self._timers.now_s,
        )
        side = _Side(self, machine, start.decode_address, start.block_ids)
        self._sending[start.transfer_id] = side
        side.post(Started())

    def _tell(self, sides: "dict[str, _Side]", transfer_id: str, event: object) -> None:
        side = sides.get(transfer_id)
        if side is not None:
            side.post(event)

    # The network.

    def frame_came(
        self, sender: str, stream: Stream, transfer_id: str, frame: Frame, *, is_for_receiver: bool
    ) -> None:
        """From the other side of a transfer. sender: its address."""
        if self._is_dead:
            return
        if self._timers.now_s < self._paused_until_s:
            self._timers.call_at(
                self._paused_until_s,
                lambda: self.frame_came(sender, stream, transfer_id, frame, is_for_receiver=is_for_receiver),
            )
            return
        side = (self._receiving if is_for_receiver else self._sending).get(transfer_id)
        if side is not None and side.stream is stream:
            side.post(frame)
        elif is_for_receiver and isinstance(frame, Reserve | Resume):
            self._begin_stream(sender, stream, frame)

    def _begin_stream(self, sender: str, stream: Stream, frame: Reserve | Resume) -> None:
        """The first frame of a stream: as kvtransfer.server."""
        side = self._receiving.get(frame.transfer_id)
        if isinstance(frame, Reserve):
            if side is not None and side.may_be_asked_again(frame):
                side.take_over()
                # It may have ended by that.
                side = self._receiving.get(frame.transfer_id)
            elif side is not None:
                refused = Refused("this transfer is served here already", retryable=False)
                self._answer(sender, stream, frame.transfer_id, refused)
                return
            if side is None:
                side = self._receiving[frame.transfer_id] = _Side(self, self._new_receiver(), sender, ())
        elif side is None:
            is_over = frame.incarnation == self._incarnation and self.leases.is_settled(frame.lease_id)
            answer = Committed() if is_over else Ended(f"lease {frame.lease_id} is not known here any more")
            self._answer(sender, stream, frame.transfer_id, answer)
            return
        else:
            side.take_over()
        side.stream = stream
        side.post(frame)

    def _new_receiver(self) -> ReceiverMachine:
        return ReceiverMachine(
            self._layout,
            self._incarnation,
            self.leases,
            lease_s=self._config.lease_s,
            resume_s=self._config.resume_s,
            max_in_flight=self._config.credits,
            now_s=self._timers.now_s,
        )

    def lost(self, address: str) -> None:
        """The streams from and to that address have broken."""
        for side in [*self._sending.values(), *self._receiving.values()]:
            if side.peer_address == address:
                side.post(StreamBroke(f"{address} is gone"))

    def pause(self, until_s: float) -> None:
        """The process does nothing until then: what comes waits."""
        self._paused_until_s = until_s

    def die(self) -> None:
        """The process has ended."""
        self._is_dead = True
        for side in [*self._sending.values(), *self._receiving.values()]:
            side.stop()

    def check_invariants(self) -> None:
        """Every lease is of a transfer that lives."""
        self.leases.check_invariants()
        assert len(self.leases) <= len(self._receiving), (self.leases.all(), self._receiving)

    # What the sides do.

    def _send(self, side: "_Side", frame: Frame, num_bytes: int = FRAME_BYTES) -> None:
        peer = self._peer(side.peer_address)
        if peer is None:
            self._timers.call_later(0.0, side.post, StreamBroke(f"nobody listens at {side.peer_address}"))
            return
        if side.stream is not None:
            self._send_by(side.stream, peer, side.transfer_id, frame, side.is_sender, num_bytes)

    def _answer(self, sender: str, stream: Stream, transfer_id: str, frame: Frame) -> None:
        """The only thing that is said on this stream."""
        peer = self._peer(sender)
        if peer is not None:
            self._send_by(stream, peer, transfer_id, frame, False, FRAME_BYTES)

    def _send_by(
        self,
        stream: Stream,
        peer: "SimTransfers",
        transfer_id: str,
        frame: Frame,
        is_sender: bool,
        num_bytes: int,
    ) -> None:
        network, later = self._network, self._timers.call_later
        if stream.is_broken:
            return
        if network.loses(self.address, peer.address):
            stream.is_broken = True
            for one, sides in ((self, is_sender), (peer, not is_sender)):
                later(network.break_heard_s(), one._stream_broke, stream, transfer_id, sides)
            return
        network.send(
            self.address, peer.address, num_bytes, _deliver, self, peer, stream, transfer_id, frame, is_sender
        )

    def _stream_broke(self, stream: Stream, transfer_id: str, is_sender: bool) -> None:
        """It hears that."""
        if self._timers.now_s < self._paused_until_s:
            self._timers.call_at(self._paused_until_s, self._stream_broke, stream, transfer_id, is_sender)
            return
        side = (self._sending if is_sender else self._receiving).get(transfer_id)
        if side is not None:
            side.stream_broke(stream, "a message was lost")

    def _over(self, side: "_Side", end: End) -> None:
        if not side.is_sender:
            self._receiving.pop(side.transfer_id, None)
            return
        self._sending.pop(side.transfer_id, None)
        if end.error is None:
            assert end.report is not None
            self._post(messages.TransferSent(side.transfer_id, end.report))
        else:
            self._post(messages.TransferFailed(side.transfer_id, str(end.error)))


def _deliver(
    source: SimTransfers,
    target: SimTransfers,
    stream: Stream,
    transfer_id: str,
    frame: Frame,
    is_sender: bool,
) -> None:
    if target._is_dead:
        source.lost(target.address)
    else:
        target.frame_came(source.address, stream, transfer_id, frame, is_for_receiver=is_sender)


class _Side:
    """One machine: its timer, and what its actions do. peer_address: of the other side. block_ids: of a sender."""

    def __init__(
        self, owner: SimTransfers, machine: Machine, peer_address: str, block_ids: tuple[int, ...]
    ) -> None:
        self.peer_address = peer_address
        self.is_sender = isinstance(machine, SenderMachine)
        #: A receiver learns it from its first frame.
        self.transfer_id = machine.transfer_id
        #: None while it has none. A sender opens another one with each `Started`, a receiver is told by the first frame.
        self.stream: Stream | None = None
        self._owner = owner
        self._machine = machine
        self._block_ids = block_ids
        self._timer: SimTimer | None = None
        self._timer_at_s = math.inf

    def post(self, event: object) -> None:
        """One event; what it leads to is done."""
        owner = self._owner
        if owner._is_dead or self._machine.is_ended:
            return
        if isinstance(event, Reserve):
            self.transfer_id = event.transfer_id
        elif isinstance(event, Started):
            self.stream = Stream()
        elif isinstance(event, StreamBroke):
            self.stream = None
        for action in self._machine.handle(event, owner._timers.now_s):
            self._perform(action)
        self._set_timer()

    def stream_broke(self, stream: Stream, reason: str) -> None:
        """It hears that of this stream; nothing happens when it has left that."""
        if self.stream is stream:
            self.post(StreamBroke(reason))

    def take_over(self) -> None:
        """The sender has left the stream for another one."""
        if self.stream is not None:
            self.stream.is_broken = True
            self.post(StreamBroke("another stream takes over"))

    def may_be_asked_again(self, request: Reserve) -> bool:
        """Its sender may not know yet that it was granted."""
        machine = self._machine
        return isinstance(machine, ReceiverMachine) and machine.request == request and machine.is_unanswered

    def stop(self) -> None:
        """Its process has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _perform(self, action: Action) -> None:
        owner, transfer_id = self._owner, self.transfer_id
        match action:
            case SendFrame():
                owner._send(self, action.frame)
            case SendChunk():
                self._send_chunk(action)
            case WriteChunk():
                # At once, as in the driver: a stream that breaks finds no chunk that is being written.
                self.post(self._read_chunk(action.chunk.sequence_number))
            case Reconnect():
                owner._timers.call_later(action.delay_s, self.post, Started())
            case ReserveBlocks():
                request = action.request
                owner._post(
                    messages.ReserveBlocks(
                        transfer_id,
                        request.num_tokens,
                        request.max_tokens,
                        owner._timers.now_s + request.timeout_s,
                        self.peer_address,
                    )
                )
            case CancelReservation():
                owner._post(messages.CancelReservation(transfer_id))
            case CommitBlocks():
                owner._post(
                    messages.CommitTransfer(
                        transfer_id, action.block_ids, action.token_ids, action.token_digest
                    )
                )
            case ReleaseBlocks():
                owner._post(messages.ReleaseTransfer(transfer_id, action.block_ids, action.reason))
            case End():
                owner._over(self, action)
            case _:
                assert_never(action)

    def _read_chunk(self, number: int) -> ChunkWritten | ChunkDamaged:
        """From the sender's pool."""
        if self._owner._network.loses(self.peer_address, self._owner.address):
            return ChunkDamaged(number, "what was read is not what was sent")
        return ChunkWritten(number)

    def _send_chunk(self, action: SendChunk) -> None:
        where, layout = action.kv_range, self._owner._layout
        span = span_of(
            self._block_ids,
            layout.block_size,
            tokens=(where.token_lo, where.token_hi),
            layers=(where.layer_lo, where.layer_hi),
            heads=action.heads,
        )
        chunk = Chunk(
            action.lease_id,
            action.incarnation,
            action.sequence_number,
            where,
            action.heads,
            action.codec,
            0,
            source_block_ids=span.block_ids,
            source_first_token=span.first_token,
        )
        self._owner._timers.call_later(0.0, self.post, ChunkRead(action.sequence_number, 0, FRAME_BYTES))
        num_bytes = where.num_layers * where.num_tokens * layout.token_bytes
        self._owner._send(self, chunk, num_bytes)

    def _set_timer(self) -> None:
        # Mostly it is later than before, and the old timer finds that out. Infinite once the machine has ended.
        due_s = self._machine.next_deadline_s
        if due_s < self._timer_at_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = due_s
            self._timer = self._owner._timers.call_at(due_s, self._on_timer)
        elif self._timer is not None and self._machine.is_ended:
            self._timer.cancel()
            self._timer_at_s = math.inf

    def _on_timer(self) -> None:
        owner = self._owner
        if owner._timers.now_s < owner._paused_until_s:
            self._timer = owner._timers.call_at(owner._paused_until_s, self._on_timer)
            return
        self._timer_at_s = math.inf
        self.post(TimePassed())
