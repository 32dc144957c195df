"""Runs one machine over its streams: its clock, its tasks, its host.

Everything that touches the machine happens in the loop, one event at a time. What an action does to
the host happens at once; what it sends waits in a queue for the writer.
"""

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from kvtransfer.chunk_codec import unpack_chunk
from kvtransfer.chunk_reading import ChunkReader
from kvtransfer.chunk_writing import ChunkWriter
from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import CorruptFrame, MalformedFrame, PhasewiseTransferError, ReservationRefused
from kvtransfer.frames import Announce, Chunk
from kvtransfer.host import KvHost
from kvtransfer.pool import PoolOffer, PoolOpener
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    ChunkDamaged,
    ChunkRead,
    ChunkWritten,
    CommitBlocks,
    End,
    FrameDamaged,
    HostBroke,
    Machine,
    Reconnect,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    StreamBroke,
    TimePassed,
    TransferState,
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
#: Messages that are ready together are written together up to about this size: each write takes a call of gRPC, which
#: costs more than these bytes.
MAX_TOGETHER_BYTES = 2**16
#: Ways on which the receiver copies a chunk while the sender computes its checksum. On the others one does both.
ANNOUNCED_WAYS = frozenset({"shm", "cuda_ipc"})

Outbox = asyncio.Queue[SendFrame | SendChunk]


class Session:
    """One transfer on one side, over one stream or, when that breaks, several after each other.

    Must be made, and used, in the loop. block_ids: of a sender, its blocks in the order of the sequence. The host's
    blocks are back when the machine has ended. pools: of a receiver. on_event: called after each event.
    """

    def __init__(
        self,
        machine: Machine,
        host: KvHost,
        *,
        block_ids: Sequence[int] = (),
        pools: PoolOpener | None = None,
        on_event: Callable[[], None] | None = None,
    ) -> None:
        self.machine = machine
        self.outcome: End | None = None
        #: Of a suspended sender: when to open the next stream.
        self.reconnect_delay_s = 0.0
        self.num_corrupt_chunks = 0
        #: Streams of chunks that are being read.
        self.num_feeds = 0
        self._host = host
        self._reader = ChunkReader(host, block_ids)
        self._pools = pools
        self._on_event = on_event
        self._writer = ChunkWriter(host, machine.wants)
        self._loop = asyncio.get_running_loop()
        self._outbox: Outbox = asyncio.Queue()
        #: Chunks go here while there are streams for them alone.
        self._chunk_outbox: Outbox = asyncio.Queue()
        self._num_chunk_streams = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._ended = asyncio.Event()
        #: The streams that are attached now have to be left.
        self._broke = asyncio.Event()
        self._attached: asyncio.Task[None] | None = None
        self._reservation: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = math.inf
        self._set_timer()

    @property
    def is_ended(self) -> bool:
        """The machine has ended."""
        return self._ended.is_set()

    def post(self, event: object) -> None:
        """Let the machine handle an event, and do what it says."""
        try:
            actions = self.machine.handle(event, self._loop.time())
            # First: what is performed may come back here, and ask how it ended.
            self.outcome = next((one for one in actions if isinstance(one, End)), self.outcome)
            for action in actions:
                self._perform(action)
        finally:
            if self.machine.is_ended and not self._ended.is_set():
                self._ended.set()
                self._let_go()
            if isinstance(event, StreamBroke):
                self._broke.set()
            self._set_timer()
            if self._on_event is not None:
                self._on_event()

    def stream_broke(self, problem: str) -> None:
        """The streams have to be opened anew. One failure breaks several: only the first one is an event."""
        if not self._broke.is_set():
            self.post(StreamBroke(problem))

    async def attach(self, stream: MessageStream, *, awaits_end: bool) -> None:
        """Until the machine has ended and its last frames are out, or the stream is lost and may be followed by another.

        awaits_end: the side that opened the stream, which closes it and lets the other side end it; else it ends when
        this returns.
        """
        assert self._attached is None
        self._attached = asyncio.current_task()
        self._broke.clear()
        try:
            await self._serve(stream, awaits_end=awaits_end)
        finally:
            self._attached = None
            # What waits to be sent was meant for this stream. What matters of it is said again on the next.
            self._reader.forget_announced()
            self._writer.forget_announced()
            for outbox in (self._outbox, self._chunk_outbox):
                while not outbox.empty():
                    outbox.get_nowait()
                    outbox.task_done()
            self._has_room.set()

    async def detach(self) -> None:
        """Leave the stream that is attached: its other end has lost it."""
        # While one waits here another may attach.
        while self._attached is not None:
            self._attached.cancel()
            await asyncio.wait((self._attached,))

    async def feed(self, stream: MessageStream) -> None:
        """Receiver: take chunks from one more stream until it ends. One that breaks is the sender's to resume."""
        self.num_feeds += 1
        reading = asyncio.create_task(self._read(stream, waits_for_room=True, is_main=False))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((reading, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_feeds -= 1
            for task in (reading, ended):
                task.cancel()
            await asyncio.gather(reading, ended, return_exceptions=True)

    async def send_chunks(self, stream: MessageStream) -> None:
        """Sender: let chunks leave by this stream too, until cancelled."""
        self._num_chunk_streams += 1
        try:
            await self._write(stream, self._chunk_outbox, is_main=False)
        finally:
            self._num_chunk_streams -= 1

    async def wait_ended(self) -> None:
        """Until the machine has ended."""
        await self._ended.wait()

    # Actions.

    def _perform(self, action: Action) -> None:
        match action:
            case SendFrame() | SendChunk():
                is_chunk = isinstance(action, SendChunk) and self._num_chunk_streams > 0
                (self._chunk_outbox if is_chunk else self._outbox).put_nowait(action)
                if self._outbox.qsize() >= MAX_QUEUED_FRAMES:
                    self._has_room.clear()
            case Reconnect():
                self.reconnect_delay_s = action.delay_s
            case ReserveBlocks():
                self._reservation = asyncio.create_task(self._reserve(action))
            case CancelReservation():
                assert self._reservation is not None
                self._reservation.cancel()
            case WriteChunk():
                self.post(self._write_chunk(action))
            case CommitBlocks():
                self._host.commit(
                    self.machine.transfer_id, action.block_ids, action.token_ids, action.token_digest
                )
            case ReleaseBlocks():
                self._host.release(self.machine.transfer_id, action.block_ids, action.reason)
            case End():
                pass

    def _write_chunk(self, action: WriteChunk) -> ChunkWritten | ChunkDamaged | HostBroke:
        """Copy and check in one pass: what is wrong is in the transfer's blocks then, where nobody looks before all is right."""
        chunk = action.chunk
        try:
            checksum = self._writer.write(action)
        except Exception as error:
            logger.exception("kv_write_failed transfer_id=%s", self.machine.transfer_id)
            return HostBroke(f"writing a chunk: {error}")
        # What was packed has been checked before it was unpacked.
        if chunk.codec is CodecId.NONE and checksum != chunk.checksum:
            return self._damaged(
                chunk.sequence_number, f"its checksum is {checksum:x}, not {chunk.checksum:x}"
            )
        return ChunkWritten(chunk.sequence_number)

    def _damaged(self, number: int, problem: str) -> ChunkDamaged:
        self._note_damage(problem, number)
        return ChunkDamaged(number, problem)

    def _note_damage(self, problem: str, number: int | None) -> None:
        self.num_corrupt_chunks += 1
        if self.num_corrupt_chunks == 1:
            logger.warning(
                "chunk_corrupt transfer_id=%s number=%s reason=%s",
                self.machine.transfer_id,
                "-" if number is None else number,
                problem,
            )

    async def _reserve(self, action: ReserveBlocks) -> None:
        request = action.request
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
            await self._take_blocks(tuple(block_ids), request.offers)

    async def _take_blocks(self, block_ids: tuple[int, ...], offers: Sequence[PoolOffer]) -> None:
        """They are the transfer's, whatever comes of the way to fill them."""
        assert self._pools is not None
        if self.machine.is_ended:
            self.post(BlocksReserved(block_ids))
            return
        try:
            transport, self._writer.mapped, why = await self._pools.open(offers)
        except asyncio.CancelledError:
            # The machine has ended: they go straight back.
            self.post(BlocksReserved(block_ids))
            raise
        except ReservationRefused as refusal:
            self._host.release(self.machine.transfer_id, block_ids, refusal.reason)
            self.post(ReservationDenied(refusal.reason, refusal.retryable))
        except Exception as error:
            # What another process says of its pool may be anything.
            logger.exception("pool_open_failed transfer_id=%s", self.machine.transfer_id)
            self._host.release(self.machine.transfer_id, block_ids, f"opening the sender's pool: {error}")
            self.post(HostBroke(f"opening the sender's pool: {error}"))
        else:
            self._writer.block_ids = block_ids
            self.post(BlocksReserved(block_ids, transport, why))

    def _let_go(self) -> None:
        """The machine has ended."""
        self._writer.forget_announced()
        mapped, self._writer.mapped = self._writer.mapped, None
        if mapped is not None:
            assert self._pools is not None
            self._pools.close(mapped)

    # Tasks of `attach`.

    async def _serve(self, stream: MessageStream, *, awaits_end: bool) -> None:
        reader = asyncio.create_task(self._read(stream, waits_for_room=not awaits_end, is_main=True))
        writer = asyncio.create_task(self._write(stream, self._outbox, is_main=True))
        ended = asyncio.create_task(self._ended.wait())
        broke = asyncio.create_task(self._broke.wait())
        tasks = [reader, writer, ended, broke]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.is_set():
                if self._broke.is_set():
                    return
                # A task of ours is gone. If it raised, that is a bug, and nobody else would see it.
                (reader if reader.done() else writer).result()
            await ended
            await self._linger(stream, reader if awaits_end else None)
        finally:
            if self._ended.is_set() and self._reservation is not None:
                tasks.append(self._reservation)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, stream: MessageStream, *, waits_for_room: bool, is_main: bool) -> None:
        """Messages to events, until the stream ends. After the machine's end they change nothing."""
        while True:
            if waits_for_room:
                await self._has_room.wait()
            try:
                message = await stream.read()
            except ConnectionError as error:
                message, problem = None, str(error)
            else:
                problem = "the other side closed the stream"
            if message is None:
                if is_main:
                    self.stream_broke(problem)
                return
            if is_main and self._broke.is_set():
                # A stream of chunks has broken. What this one brings is said again on the next.
                return
            event = _event(message)
            if isinstance(event, FrameDamaged) and isinstance(event.error, CorruptFrame):
                # What it was cannot be asked for again; on the next stream both say what they miss.
                self._note_damage(str(event.error), None)
                self.stream_broke(str(event.error))
                return
            if isinstance(event, Announce):
                self._writer.announce(event.chunk)
                continue
            if isinstance(event, Chunk) and event.codec is not CodecId.NONE and self.machine.wants(event):
                event = await self._unpacked(event)
            self.post(event)
            # Not held while the next one comes, which then lies where this one did: in the caches.
            del message, event

    async def _unpacked(self, chunk: Chunk) -> object:
        """The chunk with what its codec packed, checked; in a thread, since it may take long."""
        layout = self._host.pool.layout
        try:
            return await asyncio.to_thread(unpack_chunk, chunk, layout.head_dim)
        except ValueError as error:
            self._damaged(chunk.sequence_number, str(error))
            return FrameDamaged(MalformedFrame(str(error), len(chunk.payload)), chunk.sequence_number)

    async def _write(self, stream: MessageStream, outbox: Outbox, *, is_main: bool) -> None:
        is_broken = False
        #: Out of the queue and not yet written.
        taken: deque[SendFrame | SendChunk] = deque()
        try:
            while True:
                if not taken:
                    taken.append(await outbox.get())
                self._note_room()
                messages, num_items = ([], 1) if is_broken else await self._encode_run(taken, outbox)
                # It has taken more. From here on one may wait: to write, or for the next message to come.
                self._note_room()
                try:
                    if messages:
                        await stream.write(*messages)
                except ConnectionError as error:
                    # The reader says how the main stream ended: what came before may be the reason.
                    is_broken = True
                    if not is_main:
                        self.stream_broke(f"a stream of chunks: {error}")
                # gRPC has its own copy. As for what is read: the next chunk is gathered where this one lay.
                del messages
                for _ in range(num_items):
                    taken.popleft()
                    outbox.task_done()
        finally:
            # Also when it is cancelled: whoever waits for the queue to be empty would wait for these.
            for _ in taken:
                outbox.task_done()

    def _note_room(self) -> None:
        """Messages left the queue: let the reader go on when there is room."""
        if self._outbox.qsize() < MAX_QUEUED_FRAMES:
            self._has_room.set()

    async def _encode_run(
        self, taken: deque[SendFrame | SendChunk], outbox: Outbox
    ) -> tuple[list[bytes], int]:
        """Messages to be written together, of so many items: the first one taken, and small frames right behind it.

        A chunk behind them is taken too and left for the next time: what is before it must not wait until it is read.
        """
        messages = self._announce(taken, outbox)
        if messages:
            # Before the first checksum is computed.
            return messages, 0
        num_items = 0
        while True:
            message = await self._encode(taken[num_items])
            num_items += 1
            if message is not None:
                messages.append(message)
            # What waits for streams of chunks is left to the next one that is free.
            if outbox is not self._outbox or sum(map(len, messages)) > MAX_TOGETHER_BYTES:
                return messages, num_items
            if len(taken) == num_items and not outbox.empty():
                taken.append(outbox.get_nowait())
            if len(taken) == num_items or isinstance(taken[num_items], SendChunk):
                return messages, num_items

    def _announce(self, taken: deque[SendFrame | SendChunk], outbox: Outbox) -> list[bytes]:
        """What lets the receiver begin with chunks that wait here, when it has none to copy meanwhile."""
        first = taken[0]
        is_over = self.machine.is_ended or self.machine.state is TransferState.SUSPENDED
        if is_over or not isinstance(first, SendChunk) or first.transport not in ANNOUNCED_WAYS:
            return []
        while not outbox.empty():
            taken.append(outbox.get_nowait())
        chunks = [item for item in taken if isinstance(item, SendChunk)]
        if len(chunks) < self.machine.num_in_flight:
            return []
        return self._reader.announce(chunks)

    async def _encode(self, item: SendFrame | SendChunk) -> bytes | None:
        """None for a chunk that must not be sent any more, or that the host could not read."""
        if isinstance(item, SendFrame):
            return encode(item.frame)
        if self.machine.is_ended or self.machine.state is TransferState.SUSPENDED:
            return None
        try:
            message, checksum = await self._reader.read(item)
        except Exception as error:
            logger.exception("kv_read_failed transfer_id=%s", self.machine.transfer_id)
            self.post(HostBroke(f"reading {item.kv_range}: {error}"))
            return None
        self.post(ChunkRead(item.sequence_number, checksum, len(message)))
        return None if self.machine.is_ended else message

    async def _linger(self, stream: MessageStream, reader: asyncio.Task[None] | None) -> None:
        """Let the last frames out; with a reader, see the stream end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._outbox.join()
                if reader is not None and self.outcome is not None and self.outcome.error is None:
                    # Both have said their last word: the other side ends the stream without being told.
                    await reader
                elif reader is not None:
                    await asyncio.gather(stream.close(), reader)

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
    except PhasewiseTransferError as error:
        return FrameDamaged(error)
