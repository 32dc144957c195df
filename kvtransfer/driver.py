"""Runs one machine over one stream: its clock, its tasks, its host.

Everything that touches the machine happens in the loop, one event at a time. What an action does to
the host happens at once; what it sends waits in a queue for the writer.
"""

import asyncio
import contextlib
import logging
import math

from kvtransfer.errors import CorruptFrame, MalformedFrame, ReservationRefused
from kvtransfer.frames import Chunk, Codec
from kvtransfer.host import KvHost
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    CommitBlocks,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    Machine,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    StreamBroke,
    TimePassed,
    WriteChunk,
)
from kvtransfer.stream import MessageStream
from kvtransfer.wire import decode, encode

logger = logging.getLogger(__name__)

#: How long the last frames of an ended transfer may take to leave, in seconds.
LINGER_S = 1.0
#: Answers that may wait to be written while more is read. The writer of a peer that does not read its
#: acknowledgements is thereby stopped. What a sender queues is bounded by its credits, and it reads on: if
#: both sides stopped, each would wait for the other.
MAX_QUEUED_FRAMES = 64


class Session:
    """One transfer on one side.

    Must be made, and used, in the loop. The host's blocks are back when `run` returns or raises, and
    also when `post` has ended a machine that was never run.
    """

    def __init__(self, machine: Machine, host: KvHost) -> None:
        self.machine = machine
        self.outcome: End | None = None
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[SendFrame | SendChunk] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._ended = asyncio.Event()
        self._reservation: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = math.inf
        self._set_timer()

    def post(self, event: object) -> None:
        """Let the machine handle an event, and do what it says."""
        try:
            for action in self.machine.handle(event, self._loop.time()):
                if not isinstance(action, WriteChunk):
                    self._perform(action)
                elif not self._write_chunk(action):
                    # What would follow, an acknowledgement, is not true.
                    break
        finally:
            if self.machine.is_ended:
                self._ended.set()
            self._set_timer()

    async def run(self, stream: MessageStream, *, awaits_end: bool) -> End:
        """Until the machine has ended and its last frames are out.

        awaits_end: the sender's side, which closes the stream and lets the other side end it; else it ends
        when this returns.
        """
        reader = asyncio.create_task(self._read(stream, waits_for_room=not awaits_end))
        writer = asyncio.create_task(self._write(stream))
        ended = asyncio.create_task(self._ended.wait())
        tasks = [reader, writer, ended]
        try:
            await asyncio.wait((reader, writer, ended), return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.is_set():
                # A task of ours is gone. If it raised, that is a bug, and nobody else would see it.
                (reader if reader.done() else writer).result()
            await ended
            await self._linger(stream, reader if awaits_end else None)
        finally:
            self.post(GivenUp("cancelled"))
            if self._reservation is not None:
                tasks.append(self._reservation)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert self.outcome is not None
        return self.outcome

    # Actions.

    def _perform(self, action: Action) -> None:
        """Any action but WriteChunk, which may fail."""
        match action:
            case SendFrame() | SendChunk():
                self._outbox.put_nowait(action)
                if self._outbox.qsize() >= MAX_QUEUED_FRAMES:
                    self._has_room.clear()
            case ReserveBlocks():
                self._reservation = asyncio.create_task(self._reserve(action))
            case CancelReservation():
                assert self._reservation is not None
                self._reservation.cancel()
            case CommitBlocks():
                self._host.commit(self.machine.transfer_id, action.block_ids, action.token_ids)
            case ReleaseBlocks():
                self._host.release(self.machine.transfer_id, action.block_ids, action.reason)
            case End():
                self.outcome = action

    def _write_chunk(self, chunk: WriteChunk) -> bool:
        """False, and the transfer is over, when the host could not."""
        try:
            self._host.write(chunk.block_ids, chunk.layer_lo, chunk.layer_hi, chunk.payload)
        except Exception as error:
            logger.exception("kv_write_failed transfer_id=%s", self.machine.transfer_id)
            self.post(HostBroke(f"writing a chunk: {error}"))
            return False
        return True

    async def _reserve(self, request: ReserveBlocks) -> None:
        try:
            block_ids = await self._host.reserve(
                request.transfer_id,
                num_tokens=request.num_tokens,
                max_tokens=request.max_tokens,
                timeout_s=request.timeout_s,
            )
        except ReservationRefused as refusal:
            self.post(ReservationDenied(refusal.reason, refusal.retryable))
        except Exception as error:
            logger.exception("kv_reserve_failed transfer_id=%s", self.machine.transfer_id)
            self.post(HostBroke(f"reserving blocks: {error}"))
        else:
            self.post(BlocksReserved(tuple(block_ids)))

    # Tasks of `run`.

    async def _read(self, stream: MessageStream, *, waits_for_room: bool) -> None:
        """Messages to events, until the stream ends. After the machine's end they change nothing."""
        while True:
            if waits_for_room:
                await self._has_room.wait()
            try:
                message = await stream.read()
            except ConnectionError as error:
                self.post(StreamBroke(str(error)))
                return
            if message is None:
                self.post(StreamBroke("the other side closed the stream"))
                return
            self.post(_event(message))

    async def _write(self, stream: MessageStream) -> None:
        is_broken = False
        while True:
            item = await self._outbox.get()
            if self._outbox.qsize() < MAX_QUEUED_FRAMES:
                self._has_room.set()
            message = None if is_broken else self._encode(item)
            if message is not None:
                try:
                    await stream.write(message)
                except ConnectionError:
                    # The reader says how the stream ended: what came before may be the reason.
                    is_broken = True
            self._outbox.task_done()

    def _encode(self, item: SendFrame | SendChunk) -> bytes | None:
        """None for a chunk that must not be sent any more, or that the host could not read."""
        if isinstance(item, SendFrame):
            return encode(item.frame)
        if self.machine.is_ended:
            return None
        where = item.kv_range
        try:
            payload = self._host.read(item.block_ids, where.layer_lo, where.layer_hi)
        except Exception as error:
            logger.exception("kv_read_failed transfer_id=%s", self.machine.transfer_id)
            self.post(HostBroke(f"reading {where}: {error}"))
            return None
        return encode(
            Chunk(item.lease_id, item.incarnation, item.sequence_number, where, Codec.NONE, payload)
        )

    async def _linger(self, stream: MessageStream, reader: asyncio.Task[None] | None) -> None:
        """Let the last frames out; with a reader, see the stream end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._outbox.join()
                if reader is not None:
                    await stream.close()
                    await reader

    # The clock.

    def _set_timer(self) -> None:
        """Wake when the machine has something to end or to renew.

        A deadline that has moved away is noticed when the timer fires, so most events leave it alone.
        """
        due_s = self.machine.next_deadline_s
        if self._timer is not None and (self.machine.is_ended or due_s < self._timer_at_s):
            self._timer.cancel()
            self._timer_at_s = math.inf
        if due_s < self._timer_at_s:
            self._timer_at_s = due_s
            self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at_s = math.inf
        self.post(TimePassed())


def _event(message: bytes) -> object:
    """The frame that a message holds, or what is wrong with it."""
    try:
        return decode(message)
    except CorruptFrame as error:
        return FrameDamaged(error, error.sequence_number)
    except MalformedFrame as error:
        return FrameDamaged(error)
